"""Sparse decoding with transformers as a GPU does it, its operators being plain PyTorch here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

from unisparse_flex.integrations import transformers_decode_device
from unisparse_flex.integrations.transformers import DecodeSelector, SparseStaticCache
from unisparse_flex.integrations.transformers_decode import SparseStaticLayer
from unisparse_flex.integrations.transformers_names import cache_name

from .generation import (
    ALMOST_ALL,
    FEW,
    assert_alike,
    generate,
    prompt,
    read_by_operators,
    read_by_python,
)


@pytest.fixture(autouse=True)
def by_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    read_by_operators(monkeypatch)


def answer_by_python(
    model: Any, ids: Tensor, selector: DecodeSelector, room: int, **options: Any
) -> Any:
    """What the CPU's own way of reading a cache answers, and how much it read."""
    with pytest.MonkeyPatch.context() as patch:
        read_by_python(patch)
        cache = SparseStaticCache(model.config, room, selector)
        return generate(model, ids, cache, **options), cache.density


def layers_of(cache: SparseStaticCache) -> list[SparseStaticLayer]:
    return [layer for layer in cache.layers if isinstance(layer, SparseStaticLayer)]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
@pytest.mark.parametrize("selector", [FEW, DecodeSelector(share=0.3, unit=16, min_keys=64)])
def test_a_part_is_that_of_the_choice_in_python(
    llama: Any, selector: DecodeSelector, options: dict[str, Any]
) -> None:
    ids = prompt(400, 2)
    expected, density = answer_by_python(llama, ids, selector, 512, **options)
    cache = SparseStaticCache(llama.config, 512, selector)
    found = generate(llama, ids, cache, **options)
    assert_alike(found, expected)
    assert cache.density == pytest.approx(density)
    assert 0 < density < 0.5


def test_the_compiled_decode_of_generate_is_one_graph_and_answers_alike(llama: Any) -> None:
    torch._dynamo.reset()
    ids = prompt(300, 2)
    expected = generate(llama, ids, SparseStaticCache(llama.config, 512, FEW))
    compiled = CompileConfig(fullgraph=True, mode="default")
    compiled._compile_all_devices = True
    cache = SparseStaticCache(llama.config, 512, FEW)
    counters.clear()
    found = generate(llama, ids, cache, compile_config=compiled)
    assert counters["stats"]["unique_graphs"] == 1
    assert_alike(found, expected)
    assert cache.density is not None
    assert cache.density < 0.3
    # Shorter ones and other answers are the same graph.
    cache.reset()
    generate(llama, prompt(150, 2), cache, compile_config=compiled)
    cache.reset()
    again = generate(llama, ids, cache, compile_config=compiled)
    assert torch.equal(again.sequences, expected.sequences)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_prompt_in_compiled_chunks_is_followed_and_pinned_too(llama: Any) -> None:
    torch._dynamo.reset()
    ids = prompt(400, 2)
    selector = DecodeSelector(budget=128, min_keys=0, unit=16, prompt_share=0.5)
    expected = generate(llama, ids, SparseStaticCache(llama.config, 512, selector))
    compiled = CompileConfig(mode="default")
    compiled._compile_all_devices = True
    cache = SparseStaticCache(llama.config, 512, selector)
    found = generate(llama, ids, cache, compile_config=compiled, prefill_chunk_size=128)
    assert_alike(found, expected)
    for layer in layers_of(cache):
        assert layer._reader is not None
        assert {int(count) for count in layer._reader._units.pinned.sum(-1).flatten()} == {4}


def test_summaries_and_pins_follow_the_cache(llama: Any) -> None:
    selector = DecodeSelector(budget=128, min_keys=0, unit=16, prompt_share=0.5)
    cache = SparseStaticCache(llama.config, 512, selector)
    generate(llama, prompt(400, 2), cache)
    for layer in layers_of(cache):
        assert layer._reader is not None
        units = layer._reader._units
        assert {int(count) for count in units.pinned.sum(-1).flatten()} == {4}
        numbers, scales = units.numbers.clone(), units.scales.clone()
        units.numbers.zero_()
        layer._reader.follow(layer.keys, layer.cumulative_length, 407)
        assert torch.equal(numbers, units.numbers)
        assert torch.equal(scales, units.scales)


def test_a_small_cache_is_read_whole(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(200)
    expected = generate(llama, ids, StaticCache(llama.config, max_cache_len=224))
    fewest = SparseStaticCache(llama.config, 224, DecodeSelector(share=0.1, min_keys=224))
    monkeypatch.setattr(transformers_decode_device, "FEW_BYTES", 1e9)
    small = SparseStaticCache(llama.config, 224, FEW)
    for cache in (fewest, small):
        found = generate(llama, ids, cache)
        assert torch.equal(found.sequences, expected.sequences)
        for ours, theirs in zip(found.scores, expected.scores, strict=True):
            assert torch.equal(ours, theirs)
        assert cache.density == 1.0


def test_keys_that_a_mask_hides_from_a_token_are_not_read(llama: Any) -> None:
    ids = prompt(130)
    cache = SparseStaticCache(llama.config, 256, ALMOST_ALL)
    dense = StaticCache(llama.config, max_cache_len=256)
    mask = torch.arange(256)[None, None, None] < 131
    mask[..., 20:90] = False
    found = []
    with torch.no_grad():
        for each in (cache, dense):
            llama(ids, **{cache_name(): each})
            step: dict[str, Any] = {cache_name(): each, "attention_mask": mask}
            found.append(llama(ids[:, :1], position_ids=torch.tensor([[130]]), **step).logits)
            if each is dense:
                break
            biased = {**step, "attention_mask": torch.zeros(1, 1, 1, 256)}
            with pytest.raises(ValueError, match=r"must be bool .* got torch.float32"):
                llama(ids[:, :1], position_ids=torch.tensor([[131]]), **biased)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_gradients_are_refused_by_name(llama: Any) -> None:
    cache = SparseStaticCache(llama.config, 256, FEW)
    with torch.no_grad():
        llama(prompt(130), **{cache_name(): cache})
    with pytest.raises(RuntimeError, match=r"under torch\.no_grad"):
        llama(prompt(1), **{cache_name(): cache}, position_ids=torch.tensor([[130]]))


def test_assisted_generation_is_refused_by_name(llama: Any) -> None:
    cache = SparseStaticCache(llama.config, 256, FEW)
    with pytest.raises(NotImplementedError, match="generate without assistant_model"):
        generate(llama, prompt(100), cache, prompt_lookup_num_tokens=3)


def test_several_rows_at_once_read_everything(llama: Any) -> None:
    ids = prompt(140)
    logits = []
    with torch.no_grad():
        for cache in (
            SparseStaticCache(llama.config, 256, FEW),
            StaticCache(llama.config, max_cache_len=256),
        ):
            llama(ids[:, :130], **{cache_name(): cache})
            position = torch.arange(130, 140)[None]
            rest = llama(ids[:, 130:], **{cache_name(): cache}, position_ids=position)
            logits.append(rest.logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_what_nothing_chooses_for_is_refused_by_name(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.empty(1, 2, 1, 8, device="meta")
    layer = SparseStaticLayer(32, FEW, llama.config)
    with pytest.raises(NotImplementedError, match="a CPU or a CUDA device, got meta"):
        layer.lazy_initialization(rows, rows)
    monkeypatch.setattr(SparseStaticLayer, "_obstacle", lambda *_: "they take a head_dim up to 256")
    wide = torch.empty(1, 2, 1, 320)
    with pytest.raises(NotImplementedError, match=r"head_dim 320 on cpu: they take .* StaticCache"):
        layer.lazy_initialization(wide, wide)
