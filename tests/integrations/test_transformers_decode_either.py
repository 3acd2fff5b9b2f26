"""Sparse decoding with transformers, whether Python chooses or operators do, as on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from unisparse_flex.integrations import transformers_decode
from unisparse_flex.integrations.transformers import SparseStaticCache
from unisparse_flex.integrations.transformers_names import cache_name

from .generation import (
    ALMOST_ALL,
    FEW,
    assert_alike,
    create,
    generate,
    prompt,
    read_by_operators,
    read_by_python,
)


@pytest.fixture(autouse=True, params=["python", "operators"])
def chosen_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "operators":
        read_by_operators(monkeypatch)
    else:
        read_by_python(monkeypatch)
    if request.param == "nobody":
        # A part is always taken to be slower than the whole.
        monkeypatch.setattr(transformers_decode, "CHOICE_BYTES", 1e12)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_all_units_answer_as_the_dense_cache(
    llama: Any, batch: int, options: dict[str, Any]
) -> None:
    ids = prompt(200, batch)
    expected = generate(llama, ids, StaticCache(llama.config, max_cache_len=224), **options)
    cache = SparseStaticCache(llama.config, 215, ALMOST_ALL)
    assert_alike(generate(llama, ids, cache, **options), expected)
    assert cache.density == 1.0


def logits_of_steps(model: Any, ids: Tensor, cache: Any, steps: int = 3) -> Tensor:
    """[steps, vocabulary] after a prompt that leaves so many tokens."""
    found = []
    with torch.no_grad():
        model(ids[:, :-steps], **{cache_name(): cache}, logits_to_keep=1)
        for at in range(ids.shape[1] - steps, ids.shape[1]):
            position = torch.tensor([[at]])
            step = model(ids[:, at : at + 1], **{cache_name(): cache}, position_ids=position)
            found.append(step.logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("chosen_by", ["python", "operators", "nobody"], indirect=True)
@pytest.mark.parametrize("room", [1, 2, 8])
@pytest.mark.parametrize(
    ("family", "window"), [("llama", None), ("mistral", 4096), ("mistral", 64), ("gemma", 4096)]
)
def test_places_that_were_not_written_are_not_read(
    llama: Any, family: str, window: int | None, room: int
) -> None:
    model = llama if family == "llama" else create(family, window=window)
    ids = prompt(130)
    expected = logits_of_steps(model, ids, DynamicCache(config=model.config))
    cache = SparseStaticCache(model.config, 130 * room, ALMOST_ALL)
    found = logits_of_steps(model, ids, cache)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_cache_that_is_reset_answers_as_a_new_one(llama: Any) -> None:
    cache = SparseStaticCache(llama.config, 512, FEW)
    first = generate(llama, prompt(300), cache).sequences
    cache.reset()
    generate(llama, prompt(100), cache)
    cache.reset()
    assert torch.equal(generate(llama, prompt(300), cache).sequences, first)


@pytest.mark.parametrize("length", [100, 200])
def test_padding_is_refused_by_name(llama: Any, length: int) -> None:
    ids = prompt(length, 2)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    cache = SparseStaticCache(llama.config, 256, FEW)
    with pytest.raises(ValueError, match="prompts without padding"):
        generate(llama, ids, cache, attention_mask=mask)


def test_an_attention_that_does_not_ask_is_refused_by_name(llama: Any) -> None:
    cache = SparseStaticCache(llama.config, 128, FEW)
    llama.set_attn_implementation("sdpa")
    try:
        with pytest.raises(RuntimeError, match=r"'sdpa'; call model.set_attn_implementation"):
            generate(llama, prompt(100), cache)
    finally:
        llama.set_attn_implementation("unisparse")


def test_a_cache_of_another_models_config_is_refused_by_name(llama: Any) -> None:
    cache = SparseStaticCache(llama.config, 128, FEW)
    other = create("llama")
    other.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"the config of the model .*model\.config, \.\.\.\)"):
        generate(other, prompt(100), cache)


@pytest.mark.parametrize(("length", "chunk"), [(300, None), (300, 64)])
def test_a_prompt_without_room_is_told_how_much_it_needs(
    llama: Any, length: int, chunk: int | None
) -> None:
    cache = SparseStaticCache(llama.config, 215, ALMOST_ALL)
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    message = (
        r"max_cache_len must be at least 300 for 300 tokens, got 224 \(in whole units\); give .* "
        "the prompt and of the whole answer together"
        if chunk is None
        else "at least 256 for 64 tokens after the 192 before, got 224"
    )
    with pytest.raises(ValueError, match=message):
        generate(llama, prompt(length), cache, **options)


def test_an_answer_without_room_is_told_so(llama: Any) -> None:
    cache = SparseStaticCache(llama.config, 203, ALMOST_ALL)
    # The last of the eight tokens is never read.
    generate(llama, prompt(201), cache)
    cache.reset()
    with pytest.raises(ValueError, match="at least 209 for 1 token after the 208 before, got 208"):
        generate(llama, prompt(202), cache)
