"""On CUDA: the selection kernels against the reference, captured, compiled, without waiting."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.calls import (
    KernelCall,
    assert_same_lists,
    assert_selects,
    assert_well_formed,
    fixed_call,
    tolerance_of,
    widen,
)
from unisparse_flex.block_masks import Sampled
from unisparse_flex.block_masks.block_lists import BlockLists
from unisparse_flex.block_masks.kernels import operator, settings_of
from unisparse_flex.block_masks.kernels.gpu import Gpu
from unisparse_flex.block_masks.kernels.recording import Recordings
from unisparse_flex.block_masks.kernels.self_check import find_failure
from unisparse_flex.block_masks.kernels.settings import encode_settings
from unisparse_flex.block_masks.scoring import compute_sampled_scores, default_scale

from .waiting import never_waiting

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a test changes in a launcher a recording of before would not know.
    monkeypatch.setattr(operator, "_recordings", Recordings())
    if torch.cuda.get_device_capability() < operator.LEAST_CAPABILITY:
        pytest.skip("the kernels need compute capability 8.0")


def cuda_call(q_len: int, kv_len: int | None = None, **fields: Any) -> KernelCall:
    """Eight heads in two groups, blocks of 128; one sink and one last query block."""
    plain: dict[str, Any] = {
        "kv_heads": 2,
        "group": 4,
        "head_dim": 128,
        "dtype": BF16,
        "block_size": 128,
        "c_q": 8,
        "c_k": 8,
        "sink_blocks": 1,
        "last_query_blocks": 1,
    }
    return fixed_call(q_len, kv_len, **{**plain, **fields})


def tokens_of(call: KernelCall) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(call.seed)

    def tokens(heads: int, length: int) -> Tensor:
        def noise(count: int) -> Tensor:
            shape = (call.batch, heads, count, call.head_dim)
            return torch.randn(shape, device="cuda", generator=generator)

        # Some blocks of keys differ from others.
        drift = noise(-(-length // 64)).repeat_interleave(64, dim=2)[:, :, :length]
        return (noise(length) + drift).to(call.dtype)

    return tokens(call.q_heads, call.q_len), tokens(call.kv_heads, call.kv_len)


def arguments(call: KernelCall) -> dict[str, Any]:
    """The operator's keyword arguments."""
    scale = default_scale(call.head_dim)
    settings = encode_settings(*settings_of(call.selector))
    return {"scale": scale, "settings": settings, "causal_offset": call.offset}


def run(call: KernelCall, query: Tensor, key: Tensor) -> BlockLists:
    assert operator.obstacle(query, key, call.geometry, default_scale(call.head_dim)) is None
    return BlockLists(*torch.ops.unisparse.select_blocks(query, key, **arguments(call)))


BY_HEAD = (0.05, 0.02, 0.0, 0.01, 0.2, 0.004, 1.0, 0.03)
CALLS = {
    "keys of a block": cuda_call(
        4096, c_q=16, c_k=128, top_p=0.9, threshold=0.01, sampled_queries=4
    ),
    "keys of a block, every row": cuda_call(4096, c_q=1, c_k=128, top_p=0.9, sampled_queries=2),
    "keys of a block, float32": cuda_call(1500, dtype=FP32, c_q=4, c_k=128, top_p=0.9),
    "two rules": cuda_call(4096, top_p=0.6, threshold=0.02, sampled_queries=4),
    "two rules, float32": cuda_call(
        4096, dtype=FP32, top_p=0.7, threshold=0.01, c_q=16, c_k=16, sampled_queries=4
    ),
    "a threshold by the root of the blocks": cuda_call(
        4096, c_q=16, c_k=128, top_p=0.6, threshold=0.01, threshold_blocks=64, sampled_queries=4
    ),
    "root of the blocks, chunk": cuda_call(
        1000, 4097, dtype=FP32, threshold=0.02, threshold_blocks=8, sampled_queries=4
    ),
    "thresholds of heads": cuda_call(
        4096, c_q=16, c_k=128, top_p=0.6, head_thresholds=BY_HEAD, sampled_queries=4
    ),
    "thresholds of heads, by the root of the blocks": cuda_call(
        777, dtype=FP32, head_thresholds=BY_HEAD, threshold_blocks=8, sampled_queries=4, batch=2
    ),
    "float32, ragged": cuda_call(777, dtype=FP32, top_p=0.9, sampled_queries=4),
    "float32": cuda_call(4096, dtype=FP32, threshold=0.01, c_h=4, sampled_queries=4),
    "float32, long": cuda_call(16384, dtype=FP32, top_p=0.9),
    "ragged": cuda_call(777, top_p=0.9, sampled_queries=4),
    "chunk": cuda_call(1000, 4097, top_p=0.9, sampled_queries=4, c_h=4),
    "cross": cuda_call(500, 4096, causal=False, top_k=9, sampled_queries=4),
    "long": cuda_call(16384, threshold=0.01, c_h=4, sampled_queries=4),
    "head_dim 64": cuda_call(4096, head_dim=64, top_p=0.9, dtype=FP16),
    "head_dim 80": cuda_call(4096, head_dim=80, top_p=0.9, sampled_queries=4),
    "head_dim 256": cuda_call(1500, head_dim=256, top_p=0.9, sampled_queries=4),
    "blocks of 32": cuda_call(1500, block_size=32, threshold=0.02, sampled_queries=4, batch=2),
    "blocks of 16": cuda_call(
        777, block_size=16, dtype=FP32, head_dim=64, threshold=0.02, sampled_queries=4
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_operator_selects_as_the_reference_but_where_rounding_decides(name: str) -> None:
    call = CALLS[name]
    query, key = tokens_of(call)
    lists = run(call, query, key)
    differing = assert_selects(call, lists, query, key)
    share = 1e-4 if call.dtype is FP32 else 0.02
    assert differing <= share * lists.kept().sum().item()


@pytest.mark.parametrize("name", ["keys of a block", "two rules", "keys of a block, float32"])
def test_keys_read_from_their_addresses_select_alike(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before Hopper, first in this GPU's tiles and then in older ones'."""
    from unisparse_flex.block_masks.kernels import score, select

    call = CALLS[name]
    query, key = tokens_of(call)
    mapped = run(call, query, key)
    here = Gpu(torch.cuda.get_device_capability())
    for gpu in (here, Gpu.of_capability((8, 0))):
        for module in (score, select):
            monkeypatch.setattr(module, "gpu_of", lambda _, gpu=gpu: gpu)
        monkeypatch.setattr(operator, "_recordings", Recordings())
        lists = run(call, query, key)
        if gpu is here:
            assert_same_lists(lists, mapped)
        else:
            assert_selects(call, lists, query, key)


def test_this_gpu_passes_the_check_of_those_that_nobody_measured() -> None:
    assert find_failure(torch.device("cuda", 0), operator.select_lists) == ""


@pytest.mark.parametrize("name", ["float32, ragged", "ragged", "blocks of 16", "long"])
def test_lists_are_well_formed_whatever_the_scores(name: str) -> None:
    for seed in range(100):
        call = replace(CALLS[name], seed=seed)
        assert_well_formed(call, run(call, *tokens_of(call)))


@pytest.mark.parametrize("residue", [0, 1, 63, 127])
def test_every_offset_selects_as_the_reference(residue: int) -> None:
    call = cuda_call(
        300, 300 + 512 + residue, dtype=FP32, head_dim=64, threshold=0.1, sampled_queries=2
    )
    query, key = tokens_of(call)
    assert_selects(call, run(call, query, key), query, key)


def test_a_key_that_is_not_a_number_keeps_all_for_those_who_see_it() -> None:
    call = cuda_call(1000, top_k=2, sampled_queries=4)
    query, key = tokens_of(call)
    key[0, 1, 300, 5] = float("nan")
    keep = run(call, query, key).kept()
    visible = call.geometry.visible_blocks(query.device)
    assert keep[0, 4:, 2:].equal(visible[2:].expand(4, -1, -1))
    assert_well_formed(call, run(call, query, key))
    assert keep[0, :4, 4:7].sum(-1).eq(2).all()


def test_memory_layout_changes_nothing() -> None:
    call = cuda_call(777, top_p=0.9, sampled_queries=4)
    query, key = tokens_of(call)
    whole = run(call, query, key)
    for change in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t[..., :1], t], -1)[..., 1:],
    ):
        assert_same_lists(run(call, change(query), change(key)), whole)


def test_turns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from unisparse_flex.block_masks.kernels import lists

    call = cuda_call(4096, top_p=0.9, sampled_queries=4)
    query, key = tokens_of(call)
    whole = run(call, query, key)
    monkeypatch.setattr(lists, "SCRATCH_BYTES", 2**16)
    assert_same_lists(run(call, query, key), whole)


@pytest.mark.parametrize("c_k", [8, 128])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_shared_launches_select_as_launches_of_their_own(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, dtype: torch.dtype, c_k: int
) -> None:
    from unisparse_flex.block_masks.kernels import lists, pool, score

    call = cuda_call(
        2000, top_p=0.9, c_q=16, c_k=c_k, sampled_queries=4, head_dim=head_dim, dtype=dtype
    )
    query, key = tokens_of(call)
    shared = run(call, query, key)

    def apart(coarse: Any, fine: Any, **turn: Any) -> Any:
        return score.score(coarse, **turn), score.score(fine, **turn)

    monkeypatch.setattr(lists, "score_both", apart)
    monkeypatch.setattr(pool, "FEW_PROGRAMS", 0)
    monkeypatch.setattr(operator, "_recordings", Recordings())
    assert_same_lists(run(call, query, key), shared)


def test_the_kernels_never_wait_for_the_device() -> None:
    call = cuda_call(4096, top_p=0.9, sampled_queries=4)
    query, key = tokens_of(call)
    expected = run(call, query, key)
    with never_waiting():
        selection = call.selector.compute_selection(
            query,
            key,
            geometry=call.geometry,
            scale=default_scale(call.head_dim),
            attn_mask=None,
        )
        lists = BlockLists(*selection.block_lists())
    assert_same_lists(lists, expected)
    assert selection.keep.equal(expected.kept())


def test_a_captured_graph_selects_for_new_inputs() -> None:
    call = cuda_call(1000, top_p=0.9, sampled_queries=4)
    query, key = tokens_of(call)
    first = run(call, query, key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call, query, key)
    graph.replay()
    assert_same_lists(captured, first)

    query.copy_(query.flip(2))
    key.copy_(key.roll(300, dims=2))
    graph.replay()
    expected = run(call, query, key)
    assert_same_lists(captured, expected)
    assert not expected.kept().equal(first.kept())


def test_a_compiled_graph_takes_any_length() -> None:
    torch._dynamo.reset()
    options = arguments(cuda_call(777, top_p=0.9, sampled_queries=4))
    del options["causal_offset"]

    def select(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        offset = key.shape[2] - query.shape[2]
        return torch.ops.unisparse.select_blocks(query, key, causal_offset=offset, **options)

    compiled = torch.compile(select, fullgraph=True, dynamic=True)
    for q_len, kv_len in ((777, 900), (1024, 1200), (130, 4096)):
        call = cuda_call(q_len, kv_len, top_p=0.9, sampled_queries=4)
        query, key = tokens_of(call)
        assert_same_lists(BlockLists(*compiled(query, key)), run(call, query, key))


def test_the_selector_runs_its_kernels_in_a_compiled_graph() -> None:
    torch._dynamo.reset()
    call = cuda_call(777, threshold=0.02, c_h=4, sampled_queries=4)

    def keep(query: Tensor, key: Tensor) -> Tensor:
        return call.selector.select(query, key, is_causal=True).keep

    compiled = torch.compile(keep, fullgraph=True, dynamic=False)
    query, key = tokens_of(call)
    assert compiled(query, key).equal(run(call, query, key).kept())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_graph_has_the_thresholds_of_its_heads(mode: str) -> None:
    torch._dynamo.reset()
    call = cuda_call(777, head_thresholds=tuple(t / 2 for t in BY_HEAD), sampled_queries=4)

    def keep(query: Tensor, key: Tensor) -> Tensor:
        return call.selector.select(query, key, is_causal=True).keep

    compiled = torch.compile(keep, fullgraph=True, dynamic=False, mode=mode)
    query, key = tokens_of(call)
    found = [compiled(query, key).clone() for _ in range(4)]
    expected = run(call, query, key).kept()
    assert all(kept.equal(expected) for kept in found)


def test_a_captured_graph_has_the_thresholds_of_its_heads() -> None:
    call = cuda_call(1000, head_thresholds=BY_HEAD, sampled_queries=4)
    query, key = tokens_of(call)
    first = run(call, query, key)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call, query, key)
    graph.replay()
    assert_same_lists(captured, first)


@pytest.mark.parametrize("causal", [False, True])
def test_the_operator_passes_torchs_own_checks(causal: bool) -> None:
    call = cuda_call(300, causal=causal, top_k=2, sampled_queries=2)
    torch.library.opcheck(
        torch.ops.unisparse.select_blocks.default,
        tokens_of(call),
        arguments(call),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("deviation", [1.0, 59.0, 200.0])
@pytest.mark.parametrize("splits", [1, 16])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_wide_logits_select_as_the_reference(
    monkeypatch: pytest.MonkeyPatch, deviation: float, splits: int, dtype: torch.dtype
) -> None:
    from unisparse_flex.block_masks.kernels import score

    monkeypatch.setattr(score, "MOST_SPLITS", splits)
    # Fewer rows than the shortest prompts have are split without being asked to.
    monkeypatch.setattr(score, "PROGRAMS_WANTED", 2048)
    call = cuda_call(4096, c_q=16, c_k=4, top_p=0.6, threshold=0.02, sampled_queries=4, dtype=dtype)
    query, key = widen(call, deviation, group=64)
    query, key = query.cuda(), key.cuda()
    lists = run(call, query, key)
    # Logits are rounded to float32, and multiplied in other orders.
    differing = assert_selects(call, lists, query, key, tolerance_of(call, query, key))
    share = 1e-3 if dtype is FP32 else 0.02
    assert differing <= share * lists.kept().sum().item()
    if deviation > 1:
        visible = call.geometry.visible_blocks(query.device)
        assert lists.kept().sum() < 0.5 * call.q_heads * visible.sum()


def test_default_settings_select_as_the_reference_where_logits_are_wide() -> None:
    call = cuda_call(
        8192, c_q=16, c_k=128, top_p=0.928, threshold=0.006, threshold_blocks=64, sampled_queries=4
    )
    query, key = widen(call, 59.0, group=128)
    query, key = query.cuda(), key.cuda()
    lists = run(call, query, key)
    differing = assert_selects(call, lists, query, key, tolerance_of(call, query, key))
    assert differing <= 0.02 * lists.kept().sum().item()


def test_a_key_that_is_not_a_number_among_wide_logits_keeps_all_for_those_who_see_it() -> None:
    call = cuda_call(2048, threshold=0.1, sampled_queries=4)
    query, key = (tokens.cuda() for tokens in widen(call, 200.0, group=64))
    key[0, 1, 300, 5] = float("nan")
    keep = run(call, query, key).kept()
    visible = call.geometry.visible_blocks(query.device)
    assert keep[0, 4:, 2:].equal(visible[2:].expand(4, -1, -1))
    assert keep[0, :4, 4:15].sum() < 0.9 * 4 * visible[4:15].sum()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_plain_pytorch_multiplies_sampled_rows_exactly(dtype: torch.dtype, compiled: bool) -> None:
    torch._dynamo.reset()
    call = cuda_call(700, 900, sampled_queries=4, top_k=3, dtype=dtype)
    query, key = tokens_of(call)
    options: dict[str, Any] = {
        "geometry": call.geometry,
        "granularity": Sampled(queries=4),
        "scale": default_scale(call.head_dim),
    }
    run: Any = partial(compute_sampled_scores, **options)
    found = (torch.compile(run, fullgraph=True) if compiled else run)(query, key)
    expected = run(query.float(), key.float())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
