"""``min_length=None``: the cost model decides, exactly or by one guard, at next to no cost."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.api.capture import GraphCount
from tests.api.models import SELECTOR, Attention, create, embeddings
from tests.api.reference import assert_computes
from unisparse_flex import UniSparse, explain, optimize
from unisparse_flex.passes import DenseReason, SparseConfig
from unisparse_flex.passes.calls.sdpa import SdpaCall
from unisparse_flex.passes.decision import cost_forecast as prediction
from unisparse_flex.passes.decision import device_rates, found_rates
from unisparse_flex.passes.decision import refusals as decision
from unisparse_flex.passes.decision.refusals import refuse

AUTOMATIC = SparseConfig(selector=UniSparse(), min_length=None, min_queries=128)
# Sparse attention for nothing but its launch: the break-even is where dense takes as long.
SIMPLE = device_rates.DeviceRates(
    device="cpu",
    dtype="float32",
    source="estimate: made up",
    tile=1,
    dense_launch=0.0,
    dense_flop_rate=1e9,
    dense_exp_rate=1e30,
    select_launch=0.0,
    scoring_flop_rate=1e30,
    bandwidth=1e30,
    sort_rate=1e30,
    sparse_launch=2e-3,
    sparse_flop_rate=1e30,
    sparse_exp_rate=1e30,
    block_seconds=0.0,
)
CACHES = (found_rates._find_rates, prediction.forecast, prediction._break_even_length)


@pytest.fixture
def simple_rates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Break-evens that do not depend on a machine, short enough to run."""
    monkeypatch.setattr(found_rates, "RATES", (SIMPLE,))
    monkeypatch.setattr(device_rates.DeviceRates, "on_threads", lambda rates, _: rates)
    clear_caches()
    yield
    clear_caches()


def clear_caches() -> None:
    for cached in CACHES:
        cached.cache_clear()


def causal_call(q_len: int, kv_len: int | None = None, **options: Any) -> SdpaCall:
    query = torch.zeros(1, 9, q_len, 64)
    key = torch.zeros(1, 3, q_len if kv_len is None else kv_len, 64)
    call = SdpaCall(query=query, key=key, value=key, is_causal=True, enable_gqa=True)
    return replace(call, **options)


def break_even(call: SdpaCall, selector: Any) -> int:
    shape = prediction.call_shape(call)
    length = prediction.break_even_length(shape, selector, self_attention=True)
    assert length is not None
    return length


def counting(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    calls: list[Any] = []
    original = getattr(decision, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(decision, name, count)
    return calls


def test_known_lengths_are_compared_exactly() -> None:
    for length in (256, 900, 1500, 2048, 3000, 4096):
        call = causal_call(length)
        found = prediction.forecast(prediction.call_shape(call), AUTOMATIC.selector)
        reason = None if found.density < 0.9 else DenseReason.KEEPS_MOST
        faster = found.sparse_seconds < found.dense_seconds
        assert refuse(call, AUTOMATIC) is (reason if faster else DenseReason.SLOWER)


def test_what_is_faster_by_its_kernel_alone_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    faster = prediction.Forecast(
        dense_seconds=3.0, select_seconds=0.0, attend_seconds=1.0, density=0.95
    )
    assert faster.is_sparse_faster
    assert not faster.pays
    assert replace(faster, density=0.85).pays
    assert not replace(faster, density=0.85, attend_seconds=4.0).pays
    monkeypatch.setattr(decision, "forecast", lambda *_: faster)
    call = causal_call(512)
    assert refuse(call, AUTOMATIC) is DenseReason.KEEPS_MOST
    # What is asked for by name runs.
    assert refuse(call, replace(AUTOMATIC, min_length=0)) is None


def test_on_this_cpu_short_prompts_stay_dense_and_long_ones_do_not() -> None:
    assert refuse(causal_call(128), AUTOMATIC) is DenseReason.SLOWER
    assert refuse(causal_call(8192), AUTOMATIC) is None
    assert 128 < break_even(causal_call(512), AUTOMATIC.selector) <= 4096


@pytest.mark.parametrize("min_length", [0, 256, 10_000])
def test_an_explicit_min_length_asks_nothing(
    min_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = counting(monkeypatch, "call_shape")
    reason = refuse(causal_call(512), replace(AUTOMATIC, min_length=min_length))
    assert reason is (DenseReason.SHORT if min_length > 512 else None)
    assert asked == []


def test_decoding_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = counting(monkeypatch, "call_shape")
    lowers = counting(monkeypatch, "flex_lowers")
    assert refuse(causal_call(1, 8192), AUTOMATIC) is DenseReason.FEW_QUERIES
    assert refuse(causal_call(127, 8192), AUTOMATIC) is DenseReason.FEW_QUERIES
    assert (asked, lowers) == ([], [])


@pytest.mark.parametrize(
    ("mask", "device", "plain", "causal"),
    [
        ("", "meta", False, (False, False)),
        ("(kv <= q) & (t0[b, kv])", "meta", True, (True, False)),
        ("(kv <= q) & (t0[b, kv])", "cuda", False, (True, False)),
        ("(t0[b, kv]) & (kv <= q + n0)", "cuda", False, (False, True)),
        ("(kv <= q) & (t0[b, q] == t0[b, kv])", "cuda", False, (True, False)),
        ("t0[b, kv]", "cuda", False, (False, False)),
        ("((kv <= q) & (q < kv + 9)) | (kv < 4)", "cuda", True, (False, False)),
    ],
)
def test_kernels_select_under_masks_that_they_read(
    mask: str, device: str, plain: bool, causal: tuple[bool, bool]
) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key = (torch.empty(1, heads, 4096, 64, device=device) for heads in (9, 3))
        call = SdpaCall(query=query, key=key, value=key, enable_gqa=True, mask=mask)
        found = prediction.call_shape(call)
    assert (found.plain, found.masked) == (plain, bool(mask))
    assert (found.is_causal, found.causal_lower_right) == causal


def test_dense_attention_under_a_mask_is_what_a_masked_call_is_compared_with() -> None:
    # The same call, which plain PyTorch would attend to densely over all pairs.
    shape = prediction.call_shape(causal_call(4096))._replace(device=torch.device("cuda"))
    shape = shape._replace(dtype=torch.bfloat16)
    free, masked = (
        prediction.forecast(shape._replace(masked=flag), AUTOMATIC.selector)
        for flag in (False, True)
    )
    assert masked.dense_seconds > 2 * free.dense_seconds
    assert masked.sparse_seconds == free.sparse_seconds


def test_what_python_takes_counts_where_the_device_waits_for_it() -> None:
    given: Any = {
        "dense_seconds": 3.0,
        "select_seconds": 0.5,
        "attend_seconds": 1.5,
        "density": 1.0,
    }
    assert prediction.Forecast(**given).is_sparse_faster
    # The device waits 5 seconds for the sparse call, and works 3 on the dense one.
    waiting = prediction.Forecast(**given, host_seconds=(1.0, 5.0))
    assert not waiting.is_sparse_faster
    # A model works longer than that on each layer.
    assert prediction.Forecast(
        **given, host_seconds=(1.0, 5.0), around_seconds=4.0
    ).is_sparse_faster
    assert not prediction.Forecast(
        **given | {"attend_seconds": 2.6}, host_seconds=(1.0, 5.0), around_seconds=4.0
    ).is_sparse_faster


def test_a_shape_is_predicted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_caches()
    evaluated: list[Any] = []
    original = prediction.forecast_at

    def count(*args: Any) -> Any:
        evaluated.append(args)
        return original(*args)

    monkeypatch.setattr(prediction, "forecast_at", count)
    for _ in range(5):
        refuse(causal_call(2048), AUTOMATIC)
    assert len(evaluated) == 1
    assert prediction._seconds.cache_info().currsize <= 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"attn_mask": torch.ones(8192, 8192, dtype=torch.bool), "is_causal": False},
            DenseReason.NO_KERNEL,
        ),
        (
            {name: torch.zeros(1, 9, 8192, 64).double() for name in ("query", "key", "value")},
            DenseReason.NO_KERNEL,
        ),
        ({"query": torch.zeros(1, 9, 8192, 64, requires_grad=True)}, DenseReason.CPU_GRADIENT),
    ],
    ids=["mask", "float64", "gradient"],
)
def test_what_only_masked_sdpa_could_run_stays_dense(changes: Any, reason: DenseReason) -> None:
    call = causal_call(8192, **changes)
    assert refuse(call, AUTOMATIC) is reason
    with torch.no_grad():
        assert (refuse(call, AUTOMATIC) is None) == (reason is DenseReason.CPU_GRADIENT)
    assert refuse(call, replace(AUTOMATIC, min_length=0)) is None


def test_a_chunk_of_a_long_prompt_is_judged_by_its_own_rows() -> None:
    few, many = causal_call(128, 16384), causal_call(2048, 16384)
    lower_right = [replace(call, is_causal=False, causal_lower_right=True) for call in (few, many)]
    # The last query block is forced whole: a chunk of one block has nothing to drop.
    assert [refuse(call, AUTOMATIC) for call in lower_right] == [DenseReason.SLOWER, None]


@pytest.fixture
def uncached() -> Iterator[None]:
    """The pass does not see a graph that comes out of a cache."""
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_symbolic_lengths_compile_one_graph_on_each_side_of_the_break_even(
    backend: str, simple_rates: None, caplog: pytest.LogCaptureFixture, uncached: None
) -> None:
    torch._dynamo.reset()
    model = create(Attention)
    optimized = optimize(copy.deepcopy(model), SELECTOR)
    length = break_even_of(optimized)
    assert 128 <= length <= 400
    run = torch.compile(optimized, backend=backend, fullgraph=True, dynamic=True)
    count = GraphCount()
    lengths = (length + 100, length - 20, length, length + 333, length - 1, length - 64)
    for tokens in lengths:
        with torch.no_grad(), caplog.at_level(logging.INFO, "unisparse_flex"):
            output = run(embeddings(tokens))
        assert_computes(output, model, SELECTOR if tokens >= length else None, embeddings(tokens))
    assert int(count) == 2
    if backend == "inductor":
        reports = [record.message.splitlines()[0] for record in caplog.records]
        assert reports[0] == "1 attention calls rewritten, 0 left dense"
        assert reports[-1] == "0 attention calls rewritten, 1 left dense"


def break_even_of(model: Any) -> int:
    (call,) = explain(model, embeddings(300)).calls
    assert call.prediction is not None
    assert call.prediction.break_even is not None
    return call.prediction.break_even


def test_growing_keys_under_fixed_queries_are_guarded_by_their_own_break_even(
    simple_rates: None,
) -> None:
    class Chunk(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(query, key, key)

    torch._dynamo.reset()
    model = optimize(Chunk(), SELECTOR)
    query = torch.randn(1, 2, 160, 16)
    shape = prediction.call_shape(SdpaCall(query=query, key=query, value=query))
    length = prediction.break_even_length(shape, SELECTOR, self_attention=False)
    assert length is not None
    run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    count = GraphCount()
    with torch.no_grad():
        for keys in (length + 64, length + 200, length - 1, length - 50):
            key = torch.randn(1, 2, keys, 16)
            dense = torch.nn.functional.scaled_dot_product_attention(query, key, key)
            same = torch.allclose(run(query, key), dense, atol=1e-5)
            assert same is (keys < length)
    assert int(count) == 2


def test_where_sparse_never_pays_symbolic_lengths_compile_one_graph(
    simple_rates: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    everything = UniSparse(block_size=32, top_p=1.0)
    never = replace(SIMPLE, sparse_flop_rate=1e8)
    monkeypatch.setattr(found_rates, "RATES", (never,))
    clear_caches()
    model = optimize(create(Attention), everything)
    run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    count = GraphCount()
    with torch.no_grad():
        for tokens in (100, 300, 900):
            run(embeddings(tokens))
    assert int(count) == 1
