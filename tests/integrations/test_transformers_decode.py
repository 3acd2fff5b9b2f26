"""Sparse decoding with transformers' ``generate``: what is read, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from unisparse_flex.block_masks.pages import keep_units
from unisparse_flex.integrations import transformers_decode
from unisparse_flex.integrations.transformers import DecodeSelector, SparseStaticCache
from unisparse_flex.integrations.transformers_decode import SparseStaticLayer

from .generation import ALMOST_ALL, FEW, create, generate, prompt, read_by_python


@pytest.fixture(autouse=True)
def by_python(monkeypatch: pytest.MonkeyPatch) -> None:
    read_by_python(monkeypatch)


def test_a_cache_is_given_by_the_name_that_transformers_has_for_it(llama: Any) -> None:
    # Warnings are errors: a version that deprecates a name says so.
    cache = SparseStaticCache(llama.config, 215, ALMOST_ALL)
    assert list(cache.as_argument.values()) == [cache]
    ids = prompt(100)
    expected = generate(llama, ids, SparseStaticCache(llama.config, 215, ALMOST_ALL)).sequences
    options: Any = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found: Any = llama.generate(ids, **cache.as_argument, max_new_tokens=8, **options)
    assert torch.equal(found, expected)


def test_a_cache_of_which_nothing_was_read_has_no_density(llama: Any) -> None:
    assert SparseStaticCache(llama.config, 215, ALMOST_ALL).density is None
    windows = create("mistral", window=16)
    cache = SparseStaticCache(windows.config, 215, ALMOST_ALL)
    generate(windows, prompt(200), cache)
    assert cache.density is None


def test_fewer_units_are_read_and_summaries_are_those_of_the_keys(llama: Any) -> None:
    cache = SparseStaticCache(llama.config, 512, FEW)
    generate(llama, prompt(400), cache)
    assert cache.density is not None
    assert 0 < cache.density < 0.25
    [layer, _] = cache.layers
    assert isinstance(layer, SparseStaticLayer)
    followed = layer._units
    layer._summarize()
    layer._follow()
    for ours, fresh in zip(followed, layer._units, strict=True):
        assert torch.equal(ours.numbers, fresh.numbers)
        assert torch.equal(ours.scales, fresh.scales)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_what_the_end_of_a_prompt_looks_at_is_read_by_every_token(
    llama: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[tuple[Tensor, Tensor]] = []
    keep = keep_units

    def keeps(masses: Tensor, lengths: Tensor, selector: Any, pinned: Tensor) -> Tensor:
        chosen.append((pinned, keep(masses, lengths, selector, pinned)))
        return chosen[-1][1]

    monkeypatch.setattr(transformers_decode, "keep_units", keeps)
    selector = DecodeSelector(budget=128, min_keys=0, unit=16, prompt_share=0.5)
    generate(llama, prompt(400, 2), SparseStaticCache(llama.config, 512, selector), **options)
    assert {int(n) for pinned, _ in chosen for n in pinned.sum(-1).flatten()} == {4}
    assert all(not bool((pinned & ~kept).any()) for pinned, kept in chosen)


def test_short_caches_and_those_that_are_chosen_whole_are_read_whole(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(200)
    expected = generate(llama, ids, StaticCache(llama.config, max_cache_len=224)).sequences
    monkeypatch.setattr(transformers_decode, "CHOICE_BYTES", 1e9)
    short = SparseStaticCache(llama.config, 224, FEW)
    assert torch.equal(generate(llama, ids, short).sequences, expected)
    assert short.density == 1.0
    monkeypatch.setattr(transformers_decode, "CHOICE_BYTES", 0)
    monkeypatch.setattr(transformers_decode, "COPY", 2)
    monkeypatch.setattr(transformers_decode, "RETRY", 3)
    wide = SparseStaticCache(llama.config, 224, DecodeSelector(share=0.8, min_keys=0, unit=16))
    generate(llama, ids, wide)
    # Of seven tokens the first, and each third after it, ask what would be chosen.
    assert wide.density is not None
    assert 0.85 < wide.density < 1.0


def test_selectors_are_checked(llama: Any) -> None:
    with pytest.raises(TypeError, match="selector must be a DecodeSelector"):
        SparseStaticCache(llama.config, 128, 0.9)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="selector must leave something out"):
        SparseStaticCache(llama.config, 128, DecodeSelector(min_keys=4))
    with pytest.raises(NotImplementedError, match="must be on a CPU"):
        SparseStaticLayer(32, FEW, llama.config).lazy_initialization(
            torch.empty(1, 2, 1, 8, device="meta"), torch.empty(1, 2, 1, 8, device="meta")
        )
