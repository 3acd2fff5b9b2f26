"""`SparseStaticCache` on a GPU: its operators, what is read, and ``generate`` in CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaConfig, StaticCache

from tests.api.reference import rmse
from tests.integrations.generation import (
    ALMOST_ALL,
    FEW,
    SIZES,
    assert_alike,
    create,
    generate,
    prompt,
    read_by_operators,
)
from tests.integrations.named import NAME
from unisparse_flex.block_masks.pages import (
    UnitSummaries,
    choose_rows,
    pin_prompt,
    pin_rows,
    summarize_rows,
)
from unisparse_flex.integrations import transformers_decode_device
from unisparse_flex.integrations.transformers import (
    DecodeSelector,
    SparseStaticCache,
    register,
    unregister,
)
from unisparse_flex.integrations.transformers_decode import SparseStaticLayer
from unisparse_flex.passes.attend import attend_listed

from .waiting import never_waiting

pytestmark = pytest.mark.gpu

SCALE = 0.1
# Windows by family.
KINDS = {"llama": None, "mistral": None, "gemma": 64}
WIDE = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, Any]]:
    register(NAME)
    yield {
        kind: create(kind, window=window, sharpness=4, **WIDE).cuda()
        for kind, window in KINDS.items()
    }
    unregister(NAME)


@pytest.fixture(autouse=True)
def by_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    read_by_operators(monkeypatch)
    torch._dynamo.reset()


def exact(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """Attention to the keys that ``seen`` [B, Hkv, S] says."""
    rows = query.to(dtype).unflatten(1, (key.shape[1], -1))
    logits = (rows @ key.to(dtype).mT * scale).masked_fill(~seen[:, :, None], -torch.inf)
    return (logits.softmax(-1) @ value.to(dtype)).flatten(1, 2)


def seen_of(counts: Tensor, units: Tensor, lengths: Tensor, unit: int) -> Tensor:
    """Which keys lie in listed units, bool [B, Hkv, S]."""
    width = units.shape[2]
    listed = torch.arange(width, device=units.device) < -(-counts[..., None] // unit)
    # What is not listed goes to a place of its own.
    kept = listed.new_zeros((*listed.shape[:2], width + 1))
    kept = kept.scatter(2, units.where(listed, width).long(), value=True)[..., :width]
    place = torch.arange(width * unit, device=units.device)
    return kept.repeat_interleave(unit, -1) & (place < lengths[:, None, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("unit", "head_dim"), [(16, 64), (32, 128), (128, 80)])
def test_summaries_are_those_of_plain_pytorch(unit: int, head_dim: int, dtype: torch.dtype) -> None:
    keys = torch.randn(2, 3, 1024, head_dim, dtype=dtype, device="cuda")
    found = UnitSummaries.create(keys, unit)
    expected = UnitSummaries.create(keys.cpu(), unit)
    length = 0
    for rows in (300, 1, 1, 33, 129, 1):
        length += rows
        lengths, now = torch.zeros(2, dtype=torch.int32), torch.tensor(length)
        summarize_rows(keys, found, lengths.cuda(), now.cuda(), rows)
        summarize_rows(keys.cpu(), expected, lengths, now, rows)
    every = torch.arange(2)
    for ours, theirs in zip(found.read(every.cuda()), expected.read(every), strict=True):
        # A number may be rounded the other way.
        torch.testing.assert_close(ours.cpu(), theirs, rtol=2**-6, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "unit", "masked"),
    [(8, 2, 128, 32, 0), (7, 1, 64, 16, 1), (4, 4, 256, 64, 2), (32, 1, 96, 128, 0)],
)
def test_chosen_keys_are_attended(
    heads: int, kv_heads: int, head_dim: int, unit: int, dtype: torch.dtype, masked: int
) -> None:
    places, length = 4096, 3333
    key, value = (
        torch.randn(2, kv_heads, places, head_dim, dtype=dtype, device="cuda") for _ in range(2)
    )
    # What was never written must not be read.
    key[:, :, length:] = 100.0
    query = torch.randn(2, heads, head_dim, dtype=dtype, device="cuda")
    units = UnitSummaries.create(key, unit)
    lengths = torch.full((2,), length, dtype=torch.int32, device="cuda")
    order = torch.arange(2, dtype=torch.int32, device="cuda")[:, None]
    counter = torch.zeros(2, dtype=torch.int64, device="cuda")
    summarize_rows(key, units, lengths, torch.tensor(length, device="cuda"), length)
    selector = DecodeSelector(share=0.1, min_keys=0, unit=unit).text
    counts, listed = choose_rows(
        query, units, order, lengths, counter, selector=selector, scale=SCALE
    )
    mask = None
    seen = seen_of(counts, listed, lengths, unit)
    assert 0 < int(seen.sum()) < 0.2 * 2 * kv_heads * length
    if masked:
        mask = torch.rand(masked, places, device="cuda") < 0.8
        mask[:, length - 1] = True
        seen = seen & mask[:, None]
    found = attend_listed(query, key, value, counts, listed, lengths, mask, unit=unit, scale=SCALE)
    reference = exact(query, key, value, seen, SCALE, torch.float64)
    same = exact(query, key, value, seen, SCALE, dtype)
    assert rmse(found, reference) <= 2 * rmse(same, reference) + 1e-6


def test_a_step_waits_for_nothing_and_a_graph_repeats_it_for_other_lengths() -> None:
    keys, values = (torch.randn(2, 2, 2048, 64, device="cuda") for _ in range(2))
    query = torch.randn(2, 8, 64, device="cuda")
    units = UnitSummaries.create(keys, 32)
    lengths = torch.zeros(2, dtype=torch.int32, device="cuda")
    now = torch.tensor(2000, device="cuda")
    order = torch.arange(2, dtype=torch.int32, device="cuda")[:, None]
    counter = torch.zeros(2, dtype=torch.int64, device="cuda")
    selector = DecodeSelector(share=0.2, min_keys=64)
    summarize_rows(keys, units, lengths, now, 2000)

    def step() -> Tensor:
        summarize_rows(keys, units, lengths, now, 1)
        counts, listed = choose_rows(
            query, units, order, lengths, counter, selector=selector.text, scale=SCALE
        )
        return attend_listed(query, keys, values, counts, listed, lengths, unit=32, scale=SCALE)

    prompts = torch.randn(2, 16, 8, 64, device="cuda") * 3
    step()
    torch.cuda.synchronize()
    with never_waiting():
        pin_rows(prompts, keys, units, lengths, selector=selector.text, scale=SCALE)
        step()
    for own, key, pinned in zip(prompts, keys, units.pinned, strict=True):
        expected = pin_prompt(own.cpu(), key.cpu(), length=2000, selector=selector, scale=SCALE)
        assert torch.equal(pinned.sum(-1).cpu(), expected.sum(-1))
        # Weights that round alike may change places.
        assert int((pinned.bool().cpu() & ~expected).sum(-1).max()) <= 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    for length in (2001, 1500, 40):
        now.fill_(length)
        query.normal_()
        graph.replay()
        torch.testing.assert_close(recorded, step(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "compiled", "options"),
    [
        *((kind, compiled, {}) for kind in KINDS for compiled in (True, False)),
        ("llama", True, {"num_beams": 2}),
        ("gemma", False, {"num_beams": 2}),
    ],
)
def test_all_units_answer_as_the_dense_cache(
    models: dict[str, Any], kind: str, compiled: bool, options: dict[str, Any]
) -> None:
    model, ids = models[kind], prompt(200, 2).cuda()
    dense = StaticCache(model.config, max_cache_len=224)
    expected = generate(model, ids, dense, disable_compile=True, **options)
    options = {**options, "disable_compile": not compiled}
    cache = SparseStaticCache(model.config, 215, ALMOST_ALL)
    assert_alike(generate(model, ids, cache, **options), expected, 1e-3)
    assert cache.density == 1.0


@pytest.mark.parametrize(
    ("kind", "room"), [("llama", 1), ("llama", 8), ("mistral", 2), ("gemma", 2)]
)
def test_the_compiled_decode_is_recorded_whole_and_answers_as_the_eager_one(
    models: dict[str, Any], kind: str, room: int
) -> None:
    model, ids = models[kind], prompt(400, 2).cuda()
    size = 408 * room
    eager = SparseStaticCache(model.config, size, FEW)
    expected = generate(model, ids, eager, disable_compile=True)
    torch._dynamo.reset()
    cache = SparseStaticCache(model.config, size, FEW)
    counters.clear()
    assert_alike(generate(model, ids, cache), expected, 1e-3)
    # transformers' own sliding layers count in Python: their first step is a graph of its own.
    graphs = 2 if kind == "gemma" else 1
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert not counters["inductor"]["cudagraph_skips"]
    assert cache.density is not None
    assert 0 < cache.density < 0.3
    assert cache.density == pytest.approx(eager.density)
    # Another prompt, and the first one again, in the same graphs.
    cache.reset()
    generate(model, prompt(150, 2).cuda(), cache)
    cache.reset()
    assert_alike(generate(model, ids, cache), expected, 1e-3)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_attention_to_the_chosen_units(
    models: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[tuple[float, float]] = []

    def compared(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        found = attend_listed(query, key, value, *rest, **options)
        counts, listed, lengths = (tensor.clone() for tensor in rest[:3])
        seen = seen_of(counts, listed, lengths, options["unit"])
        assert bool(rest[3][:, None].expand_as(seen)[seen].all())
        reference, same = (
            exact(query, key, value, seen, options["scale"], dtype)
            for dtype in (torch.float64, torch.float32)
        )
        errors.append((rmse(found, reference), rmse(same, reference)))
        return found

    monkeypatch.setattr(transformers_decode_device, "attend_listed", compared)
    cache = SparseStaticCache(models[kind].config, 1024, FEW)
    generate(models[kind], prompt(400, 2).cuda(), cache, disable_compile=True)
    # The first of eight tokens is the prompt's.
    layers = sum(isinstance(layer, SparseStaticLayer) for layer in cache.layers)
    assert len(errors) == 7 * layers
    assert all(ours <= 2 * theirs + 1e-6 for ours, theirs in errors)


def test_a_small_cache_is_read_whole(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = models["llama"], prompt(200).cuda()
    expected = generate(model, ids, StaticCache(model.config, max_cache_len=224))
    fewest = SparseStaticCache(model.config, 224, DecodeSelector(share=0.1, min_keys=224))
    monkeypatch.setattr(transformers_decode_device, "FEW_BYTES", 1e9)
    for cache in (fewest, SparseStaticCache(model.config, 224, FEW)):
        torch._dynamo.reset()
        assert_alike(generate(model, ids, cache), expected, 1e-3)
        assert cache.density == 1.0


def test_padding_is_refused_by_name(models: dict[str, Any]) -> None:
    for length in (100, 200):
        ids = prompt(length, 2).cuda()
        mask = torch.ones_like(ids)
        mask[0, :30] = 0
        cache = SparseStaticCache(models["llama"].config, 256, FEW)
        with pytest.raises(ValueError, match="prompts without padding"):
            generate(models["llama"], ids, cache, attention_mask=mask)


def test_what_the_kernels_do_not_take_is_refused_by_name() -> None:
    layer = SparseStaticLayer(32, FEW, LlamaConfig(**SIZES))
    for rows, what in (
        (torch.empty(1, 2, 1, 64, dtype=torch.float64, device="cuda"), "torch.float64"),
        (torch.empty(1, 2, 1, 320, device="cuda"), "head_dim 320"),
    ):
        with pytest.raises(NotImplementedError, match=f"{what}.*use transformers' StaticCache"):
            layer.lazy_initialization(rows, rows)
