"""Sparse decoding with transformers' ``generate``: what is read, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from unisparse_flex.block_masks.pages import keep_units
from unisparse_flex.integrations import transformers_decode
from unisparse_flex.integrations.transformers import (
    DecodeSelector,
    SparseStaticCache,
    register,
    unregister,
)
from unisparse_flex.integrations.transformers_decode import SparseStaticLayer
from unisparse_flex.integrations.transformers_names import cache_name

ALMOST_ALL = DecodeSelector(share=0.999, min_keys=0, unit=16)
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
)
FEW = DecodeSelector(budget=64, min_keys=0, unit=16, sink_keys=16, last_keys=16)


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaForCausalLM]:
    register("unisparse")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=128,
        max_position_embeddings=1024,
        attn_implementation="unisparse",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(12)
        layer.self_attn.k_proj.weight.data.mul_(12)
    yield model
    unregister("unisparse")


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a part is taken to be faster, however short a cache is."""
    monkeypatch.setattr(transformers_decode, "CHOICE_BYTES", 0)
    monkeypatch.setattr(transformers_decode, "COPY", 0)


def prompt(length: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(length))


def generate(model: Any, ids: Tensor, cache: Any, **options: Any) -> Any:
    return model.generate(
        ids,
        **{cache_name(): cache},
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_all_units_answer_as_the_dense_cache(
    llama: LlamaForCausalLM, batch: int, options: dict[str, Any]
) -> None:
    ids = prompt(200, batch)
    expected = generate(llama, ids, StaticCache(llama.config, max_cache_len=224), **options)
    cache = SparseStaticCache(llama.config, 215, ALMOST_ALL)
    found = generate(llama, ids, cache, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert cache.density == 1.0


def test_a_cache_is_given_by_the_name_that_transformers_has_for_it(llama: LlamaForCausalLM) -> None:
    # Warnings are errors: a version that deprecates a name says so.
    cache = SparseStaticCache(llama.config, 215, ALMOST_ALL)
    assert list(cache.as_argument.values()) == [cache]
    ids = prompt(100)
    expected = generate(llama, ids, SparseStaticCache(llama.config, 215, ALMOST_ALL)).sequences
    options: Any = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found: Any = llama.generate(ids, **cache.as_argument, max_new_tokens=8, **options)
    assert torch.equal(found, expected)


def test_a_cache_of_which_nothing_was_read_has_no_density(llama: LlamaForCausalLM) -> None:
    assert SparseStaticCache(llama.config, 215, ALMOST_ALL).density is None
    windows = MistralForCausalLM(
        MistralConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=16,
            attn_implementation="sdpa",
        )
    ).eval()
    cache = SparseStaticCache(windows.config, 215, ALMOST_ALL)
    generate(windows, prompt(200), cache)
    assert cache.density is None


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


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("room", [1, 2, 8])
@pytest.mark.parametrize("kind", ["llama", "window beyond the cache", "window", "hybrid"])
def test_places_that_were_not_written_are_not_read(
    llama: LlamaForCausalLM, kind: str, room: int, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_decode, "CHOICE_BYTES", 0 if pays else 1e12)
    model: Any = llama
    sizes = {key: getattr(llama.config, key) for key in SIZES}
    if kind.startswith("window"):
        window = 64 if kind == "window" else 4096
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=window)).eval()
    elif kind == "hybrid":
        types = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(**sizes, head_dim=16, sliding_window=4096, layer_types=types)
        model = Gemma3ForCausalLM(config).eval()
    model.set_attn_implementation("unisparse")
    ids = prompt(130)
    expected = logits_of_steps(model, ids, DynamicCache(config=model.config))
    cache = SparseStaticCache(model.config, 130 * room, ALMOST_ALL)
    found = logits_of_steps(model, ids, cache)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_fewer_units_are_read_and_summaries_are_those_of_the_keys(llama: LlamaForCausalLM) -> None:
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
    llama: LlamaForCausalLM, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
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
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
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


def test_a_cache_that_is_reset_answers_as_a_new_one(llama: LlamaForCausalLM) -> None:
    cache = SparseStaticCache(llama.config, 512, FEW)
    first = generate(llama, prompt(300), cache).sequences
    cache.reset()
    generate(llama, prompt(100), cache)
    cache.reset()
    assert torch.equal(generate(llama, prompt(300), cache).sequences, first)


def test_padding_is_refused_by_name(llama: LlamaForCausalLM) -> None:
    ids = prompt(100, 2)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    cache = SparseStaticCache(llama.config, 128, FEW)
    with pytest.raises(ValueError, match="prompts without padding"):
        generate(llama, ids, cache, attention_mask=mask)


def test_an_attention_that_does_not_ask_is_refused_by_name(llama: LlamaForCausalLM) -> None:
    cache = SparseStaticCache(llama.config, 128, FEW)
    llama.set_attn_implementation("sdpa")
    try:
        with pytest.raises(RuntimeError, match=r"'sdpa'; call model.set_attn_implementation"):
            generate(llama, prompt(100), cache)
    finally:
        llama.set_attn_implementation("unisparse")


def test_selectors_are_checked(llama: LlamaForCausalLM) -> None:
    with pytest.raises(TypeError, match="selector must be a DecodeSelector"):
        SparseStaticCache(llama.config, 128, 0.9)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="selector must leave something out"):
        SparseStaticCache(llama.config, 128, DecodeSelector(min_keys=4))
    with pytest.raises(NotImplementedError, match="must be on a CPU"):
        SparseStaticLayer(32, FEW, llama.config).lazy_initialization(
            torch.empty(1, 2, 1, 8, device="meta"), torch.empty(1, 2, 1, 8, device="meta")
        )
