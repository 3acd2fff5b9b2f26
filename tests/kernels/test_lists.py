"""The kernels' block lists are those of the reference in plain torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.block_masks.kernels import settings_of
from unisparse_flex.block_masks.kernels.gpu import Gpu

from .calls import (
    CPU,
    RULES,
    KernelCall,
    assert_same_lists,
    assert_selects,
    assert_well_formed,
    fixed_call,
    kernel_calls,
    run,
)
from .interpreter import Kernels

NAN, INF = float("nan"), float("inf")
HALF = torch.bfloat16


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=8)
@given(data=st.data())
def test_the_lists_are_those_of_the_reference(
    kernels: Kernels, rule: str, data: st.DataObject
) -> None:
    call = data.draw(kernel_calls(rule=rule))
    query, key = call.query_key()
    assert_selects(call, run(kernels, call, query, key), query, key)


@pytest.mark.parametrize("top_p", [None, 0.3])
def test_each_head_has_its_threshold_and_0_keeps_all(kernels: Kernels, top_p: float | None) -> None:
    options: dict[str, Any] = {"batch": 2, "kv_heads": 2, "top_p": top_p, "sampled_queries": 2}
    thresholds = (0.4, 0.1, 0.0, 0.02)
    call = fixed_call(90, **options, head_thresholds=thresholds)
    query, key = call.query_key()
    found = run(kernels, call, query, key).kept()
    for head, threshold in enumerate(thresholds):
        if threshold:
            alone = fixed_call(90, **options, threshold=threshold)
            assert found[:, head].equal(run(kernels, alone, query, key).kept()[:, head])
    assert found[:, 2].equal(call.geometry.visible_blocks(CPU).expand(2, -1, -1))


@pytest.mark.parametrize("sampled_queries", [0, 2])
def test_every_causal_offset_selects_as_the_reference(
    kernels: Kernels, sampled_queries: int
) -> None:
    for offset in range(16, 32):
        call = fixed_call(
            19, 19 + offset, threshold=0.3, c_h=2, c_k=8, sampled_queries=sampled_queries
        )
        query, key = call.query_key()
        assert_selects(call, run(kernels, call, query, key), query, key)


@pytest.mark.parametrize("rule", [{"top_p": 0.9}, {"top_k": 4}, {"threshold": 0.1}])
@pytest.mark.parametrize("causal", [False, True])
def test_two_hundred_tokens_select_as_the_reference(
    kernels: Kernels, causal: bool, rule: dict[str, Any]
) -> None:
    call = fixed_call(197, 203, causal=causal, c_h=2, sampled_queries=4, **rule)
    query, key = call.query_key()
    assert_selects(call, run(kernels, call, query, key), query, key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("sampled_queries", "head_dim"), [(0, 16), (4, 24)])
def test_half_precision_differs_only_where_rounding_decides(
    kernels: Kernels, dtype: torch.dtype, sampled_queries: int, head_dim: int
) -> None:
    call = fixed_call(
        150, 160, top_p=0.8, sampled_queries=sampled_queries, head_dim=head_dim, dtype=dtype
    )
    query, key = call.query_key()
    lists = run(kernels, call, query, key)
    assert assert_selects(call, lists, query, key) <= 0.05 * lists.kept().sum()


@pytest.mark.parametrize("sampled_queries", [0, 4])
@pytest.mark.parametrize("top_k", [1, 3])
def test_among_equal_scores_the_lower_block_is_kept(
    kernels: Kernels, top_k: int, sampled_queries: int
) -> None:
    call = fixed_call(30, 96, causal=False, top_k=top_k, sampled_queries=sampled_queries)
    query, key = torch.ones(1, 2, 30, 16), torch.ones(1, 1, 96, 16)
    expected = torch.arange(6).expand(1, 2, 2, 6) < top_k
    assert run(kernels, call, query, key).kept().equal(expected)


def test_equal_scores_reach_top_p_in_order(kernels: Kernels) -> None:
    call = fixed_call(30, 128, causal=False, top_p=0.5)
    query, key = torch.zeros(1, 2, 30, 16), torch.randn(1, 1, 128, 16)
    expected = torch.arange(8).expand(1, 2, 2, 8) < 4
    assert run(kernels, call, query, key).kept().equal(expected)


@pytest.mark.parametrize("rule", [{"top_p": 0.99}, {"top_k": 1}, {"threshold": 0.9}])
@pytest.mark.parametrize("block", [0, 2, 5])
def test_a_block_with_all_the_mass_is_kept_alone(
    kernels: Kernels, block: int, rule: dict[str, Any]
) -> None:
    call = fixed_call(16, 96, causal=False, **rule)
    query, key = torch.ones(1, 2, 16, 16), torch.zeros(1, 1, 96, 16)
    key[:, :, block * 16 : (block + 1) * 16] = 15.0
    expected = torch.arange(6).expand(1, 2, 1, 6) == block
    assert run(kernels, call, query, key).kept().equal(expected)


@pytest.mark.parametrize("sampled_queries", [0, 4])
@pytest.mark.parametrize("block", [0, 3, 5])
def test_a_row_of_which_no_block_reaches_the_threshold_keeps_its_highest(
    kernels: Kernels, block: int, sampled_queries: int
) -> None:
    call = fixed_call(16, 96, causal=False, threshold=0.9, sampled_queries=sampled_queries)
    query, key = torch.ones(1, 2, 16, 16), torch.zeros(1, 1, 96, 16)
    key[:, :, block * 16 : (block + 1) * 16] = 0.1
    expected = torch.arange(6).expand(1, 2, 1, 6) == block
    assert run(kernels, call, query, key).kept().equal(expected)
    assert call.keep(query, key).equal(expected)


def later_keys(logit: float) -> tuple[KernelCall, Tensor, Tensor]:
    """Keys of logit 0 but for those of block 3; each block is a tile of its own."""
    call = fixed_call(16, 96, causal=False, c_k=1, top_k=1)
    query, key = torch.ones(1, 2, 16, 16), torch.zeros(1, 1, 96, 16)
    key[:, :, 48:64] = logit / 4
    return call, query, key


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("logit", [60.0, 80.0, 100.0, 1e6, 1e30])
def test_logits_far_above_the_first_tile_are_scored(kernels: Kernels, logit: float) -> None:
    call, query, key = later_keys(logit)
    expected = torch.arange(6).expand(1, 2, 1, 6) == 3
    assert run(kernels, call, query, key).kept().equal(expected)


@pytest.mark.parametrize("logit", [100.0, 1e6, 1e30])
def test_logits_far_below_the_first_tile_score_nothing(kernels: Kernels, logit: float) -> None:
    call, query, key = later_keys(-logit)
    least = call.with_selector(top_k=None, threshold=1e-6)
    expected = torch.arange(6).expand(1, 2, 1, 6) != 3
    assert run(kernels, least, query, key).kept().equal(expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_not_finite_keeps_rows_as_in_the_reference(
    kernels: Kernels, causal: bool, value: float
) -> None:
    call = fixed_call(64, causal=causal, threshold=0.9, sampled_queries=2, c_h=2)
    for spoilt in (0, 1):
        for token in (0, 37):
            query, key = call.query_key()
            (query, key)[spoilt][0, 0, token, 3] = value
            keep = run(kernels, call, query, key).kept()
            assert keep.equal(call.keep(query, key))
            assert keep[0, :, token // 16].equal(
                call.geometry.visible_blocks(CPU)[token // 16].expand(2, -1)
            )


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_everything_not_a_number_is_dense(kernels: Kernels) -> None:
    call = fixed_call(40, top_k=1, c_h=2, sampled_queries=4)
    query, key = (torch.full_like(tokens, NAN) for tokens in call.query_key())
    keep = run(kernels, call, query, key).kept()
    assert keep.equal(call.geometry.visible_blocks(CPU).expand_as(keep))


@pytest.mark.parametrize("causal", [False, True])
def test_guards_hold_whatever_the_scores(kernels: Kernels, causal: bool) -> None:
    for sinks, local, last in ((0, 1, 0), (2, 1, 0), (0, 3, 0), (1, 2, 2), (9, 1, 0), (0, 9, 0)):
        call = fixed_call(
            70,
            causal=causal,
            threshold=1.0,
            sink_blocks=sinks,
            local_blocks=local,
            last_query_blocks=last,
            c_h=2,
        )
        query, key = call.query_key()
        forced = call.selector.forced_blocks.locate(call.geometry, CPU)
        keep = run(kernels, call, query, key).kept()
        assert keep.equal((forced & call.geometry.visible_blocks(CPU)).expand_as(keep))


@pytest.mark.parametrize("sampled_queries", [0, 16])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (1, 16), (5, 9), (16, 16)])
@pytest.mark.parametrize("causal", [False, True])
def test_one_block_is_kept(
    kernels: Kernels, q_len: int, kv_len: int, causal: bool, sampled_queries: int
) -> None:
    call = fixed_call(q_len, kv_len, causal=causal, threshold=1.0, sampled_queries=sampled_queries)
    lists = run(kernels, call, *call.query_key())
    assert_well_formed(call, lists)
    assert lists.kept().all()
    assert lists.kept().equal(call.keep())


def test_queries_far_behind_the_last_key_see_them_all(kernels: Kernels) -> None:
    call = fixed_call(40, 33, top_p=1.0, sampled_queries=2)
    geometry = replace(call.geometry, causal_offset=0)
    query, key = call.query_key()
    lists = kernels.lists.compute_lists(
        query,
        key,
        settings_of(call.selector),
        geometry=geometry,
        scale=0.25,
    )
    assert lists.kept().equal(geometry.visible_blocks(CPU).expand(1, 2, 3, 3))


@pytest.mark.parametrize("sampled_queries", [0, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_turns_change_nothing(kernels: Kernels, causal: bool, sampled_queries: int) -> None:
    call = fixed_call(
        100, causal=causal, top_p=0.7, sampled_queries=sampled_queries, kv_heads=2, group=1
    )
    query, key = call.query_key()
    whole = run(kernels, call, query, key)
    turns = []
    for scratch, power in ((1, 256), (700, 2), (2**20, 2)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels.lists, "SCRATCH_BYTES", scratch)
            patch.setattr(kernels.lists, "LEAST_POWER", power)
            turns.append(len(list(kernels.lists.turns(call.geometry, 16))))
            assert_same_lists(run(kernels, call, query, key), whole)
    assert turns[0] == 7
    assert turns[2] == (3 if causal else 1)


@settings(max_examples=50)
@given(
    q_len=st.integers(1, 5000),
    offset=st.none() | st.integers(0, 3000),
    row_bytes=st.integers(1, 4096),
    scratch=st.integers(1, 2**20),
    power=st.sampled_from([1, 2, 16, 256]),
)
def test_turns_cover_every_query_block_once_within_the_scratch(
    kernels: Kernels, q_len: int, offset: int | None, row_bytes: int, scratch: int, power: int
) -> None:
    call = fixed_call(q_len, q_len + (offset or 0), causal=offset is not None)
    geometry = call.geometry
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.lists, "SCRATCH_BYTES", scratch)
        patch.setattr(kernels.lists, "LEAST_POWER", power)
        parts = list(kernels.lists.turns(geometry, row_bytes))
    assert [b for part in parts for b in range(part.start, part.stop)] == list(
        range(geometry.num_q_blocks)
    )
    for part in parts:
        rows = part.stop - part.start
        needed = row_bytes * rows * kernels.scratch.reach_of(geometry, part)
        assert rows == 1 or needed <= scratch


@pytest.mark.parametrize("causal", [False, True])
def test_splits_change_nothing(kernels: Kernels, causal: bool) -> None:
    call = fixed_call(70, 600, causal=causal, top_p=0.7, c_h=2, sampled_queries=2)
    query, key = call.query_key()
    score = kernels.lists._score
    splits: list[int] = []

    def record(*arguments: Any, **keywords: Any) -> Any:
        both = score(*arguments, **keywords)
        splits.extend(masses.totals.shape[2] for masses in both)
        return both

    for programs in (1, 10**6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels.lists, "_score", record)
            patch.setattr(kernels.score, "PROGRAMS_WANTED", programs)
            patch.setattr(kernels.score, "PROGRAMS_WANTED_OF_KEYS", programs)
            assert_selects(call, run(kernels, call, query, key), query, key)
    few, many = set(splits[: len(splits) // 2]), set(splits[len(splits) // 2 :])
    assert few == {1}
    assert max(many) > 1


@pytest.mark.parametrize(
    ("programs", "tiles", "wanted", "splits"),
    [(512, 64, 512, 1), (500, 64, 512, 2), (1, 64, 512, 16), (1, 11, 512, 4), (1, 1, 512, 1)],
)
def test_a_row_is_split_into_a_power_of_two(
    kernels: Kernels, programs: int, tiles: int, wanted: int, splits: int
) -> None:
    assert kernels.score.splits_of(programs, tiles, wanted) == splits


def layouts(tokens: Tensor) -> list[Tensor]:
    """The same tokens [B, H, S, D] laid out otherwise."""
    batch, heads, length, head_dim = tokens.shape
    wide = torch.full((batch, heads, length, head_dim + 3), NAN)
    wide[..., :head_dim] = tokens
    packed = torch.full((batch, length, 3, heads, head_dim), NAN)
    packed[:, :, 1] = tokens.transpose(1, 2)
    return [
        tokens.transpose(1, 2).contiguous().transpose(1, 2),
        tokens.transpose(2, 3).contiguous().transpose(2, 3),
        wide[..., :head_dim],
        packed[:, :, 1].transpose(1, 2),
        torch.cat([tokens[:, :, :1], tokens], 2)[:, :, 1:],
    ]


@pytest.mark.parametrize("sampled_queries", [0, 2])
def test_memory_layout_changes_nothing(kernels: Kernels, sampled_queries: int) -> None:
    call = fixed_call(37, 50, top_p=0.6, sampled_queries=sampled_queries, kv_heads=2, group=1)
    query, key = call.query_key()
    whole = run(kernels, call, query, key)
    for other_query, other_key in zip(layouts(query), reversed(layouts(key)), strict=True):
        assert other_query.equal(query)
        assert_same_lists(run(kernels, call, other_query, other_key), whole)


def test_keys_that_start_within_sixteen_bytes_are_copied(kernels: Kernels) -> None:
    call = fixed_call(37, top_p=0.6)
    query, key = call.query_key()
    whole = run(kernels, call, query, key)
    moved = torch.cat([torch.zeros(1), key.flatten()])[1:].view(key.shape)
    assert not kernels.score.supports_descriptor(moved)
    assert_same_lists(run(kernels, call, query, moved), whole)


@pytest.mark.parametrize("capability", [(8, 0), (12, 0)])
@pytest.mark.parametrize(
    "call",
    [
        fixed_call(90, 101, c_h=2, sampled_queries=2, top_p=0.7, head_dim=24, dtype=HALF),
        fixed_call(40, 300, causal=False, threshold=0.05, c_k=16, kv_heads=2, dtype=HALF),
    ],
    ids=["ragged", "composites"],
)
def test_other_gpus_select_as_the_reference(
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    call: KernelCall,
    capability: tuple[int, int],
) -> None:
    """Their tiles are others, and before Hopper keys are read from their addresses."""
    for module in (kernels.score, kernels.select):
        monkeypatch.setattr(module, "gpu_of", lambda _: Gpu.of_capability(capability))
    query, key = call.query_key()
    assert_selects(call, run(kernels, call, query, key), query, key)


def test_the_scale_is_heeded(kernels: Kernels) -> None:
    call = fixed_call(80, top_p=0.6)
    query, key = call.query_key()
    for scale in (1e-6, 0.1, 3.0):
        reference = call.select(query, key, scale=scale).keep
        assert run(kernels, call, query, key, scale=scale).kept().equal(reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("c_k", "causal"), [(2, True), (4, False), (16, True)])
def test_keys_pooled_in_parts_select_as_the_keys_do(
    kernels: Kernels, dtype: torch.dtype, c_k: int, causal: bool
) -> None:
    call = fixed_call(
        *(107, 187), causal=causal, c_k=c_k, c_h=2, top_p=0.7, kv_heads=2, dtype=dtype
    )
    query, key = call.query_key()
    parts = [
        kernels.lists.pool_keys(
            key[:, :, start : start + 48], group=c_k, block_size=16, blocks=-(-length // 16)
        )
        for start, length in ((0, 48), (48, 48), (96, 48), (144, 43))
    ]
    composites = torch.cat(parts, dim=2)
    found = run(kernels, call, query, composites, are_composites=True)
    expected = run(kernels, call, query, key)
    assert torch.equal(found.kept(), expected.kept())
    assert_well_formed(call, found)
