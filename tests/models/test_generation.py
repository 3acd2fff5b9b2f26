"""`generate` of an optimized model: with every block kept, token by token that of the untouched."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from unisparse_flex import optimize
from unisparse_flex.integrations.transformers_names import cache_name
from unisparse_flex.passes import DenseReason
from unisparse_flex.reports import record_attention

from .families import BY_NAME
from .family import EVERYTHING, LENGTH, SELECTOR, token_ids
from .modes import padded_batch

NEW_TOKENS = 8
BLOCK = SELECTOR.block_size
FAMILIES = ("Llama", "Qwen3", "Mistral")

SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 20}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": SAMPLING,
    "several samples of one prompt": {**SAMPLING, "num_return_sequences": 3},
    "top-p sampling": {"do_sample": True, "top_p": 0.8, "top_k": 0},
    "beam search": {"num_beams": 4},
    "several beams returned": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "beam sampling": {**SAMPLING, "num_beams": 2},
    "static cache": {"cache_implementation": "static"},
    "static cache, beams": {"cache_implementation": "static", "num_beams": 2},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prefill in chunks of 64": {"prefill_chunk_size": 64},
    "logits processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def models(family: str) -> tuple[Any, Any]:
    """The untouched model, and one optimized to keep every block."""
    untouched = BY_NAME[family].create()
    return untouched, optimize(copy.deepcopy(untouched), EVERYTHING, min_length=0)


def generate(model: Any, **inputs: Any) -> Any:
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**{**options, **inputs})


def prompt() -> dict[str, Tensor]:
    ids = token_ids()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def assert_same(output: Any, expected: Any) -> None:
    """The same tokens, from the same logits and scores."""
    assert output.sequences.equal(expected.sequences)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
    if expected.scores is not None:
        torch.testing.assert_close(output.scores, expected.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_block_kept_the_same_tokens_are_generated(family: str, case: str) -> None:
    untouched, optimized = models(family)
    options = {"output_scores": True, **CASES[case]}
    expected = generate(untouched, **prompt(), **options)
    assert_same(generate(optimized, **prompt(), **options), expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_unequal_lengths_generates_the_same_tokens(
    family: str, options: dict[str, Any]
) -> None:
    untouched, optimized = models(family)
    batch = padded_batch("left")
    expected = generate(untouched, **batch, **options)
    assert_same(generate(optimized, **batch, **options), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_as_input_generate_the_same_tokens(family: str) -> None:
    untouched, optimized = models(family)
    embeds = untouched.get_input_embeddings()(token_ids())
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    expected = generate(untouched, inputs_embeds=embeds, attention_mask=mask)
    assert_same(generate(optimized, inputs_embeds=embeds, attention_mask=mask), expected)


@pytest.mark.parametrize("assistant_is_optimized", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_assistant_model_leads_to_the_same_tokens(
    family: str, assistant_is_optimized: bool
) -> None:
    untouched, optimized = models(family)
    assistant = models(family)[assistant_is_optimized]
    expected = generate(untouched, **prompt(), assistant_model=copy.deepcopy(untouched))
    output = generate(optimized, **prompt(), assistant_model=copy.deepcopy(assistant))
    assert_same(output, expected)


@pytest.mark.parametrize("more", [1, BLOCK - 1, BLOCK, 45])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_goes_on_from_a_cache(family: str, more: int) -> None:
    """A second turn: the prompt, what was generated, and ``more`` tokens behind it."""

    def two_turns(model: Any) -> Any:
        first = generate(model, **prompt())
        ids = torch.cat((first.sequences, token_ids(length=more, seed=1)), dim=1)
        return generate(
            model,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{cache_name(): first[cache_name()]},
        )

    untouched, optimized = models(family)
    assert_same(two_turns(optimized), two_turns(untouched))


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_is_sparse_and_decoding_dense(family: str, cache_implementation: str) -> None:
    optimized = optimize(BY_NAME[family].create(), SELECTOR, min_length=0)
    with record_attention(optimized) as calls:
        generate(optimized, **prompt(), cache_implementation=cache_implementation)
    prefill, decode = calls[:2], calls[2:]
    assert [(call.decision, call.q_len) for call in prefill] == [("sparse", LENGTH)] * 2
    assert [call.reason for call in decode] == [DenseReason.FEW_QUERIES] * 2 * (NEW_TOKENS - 1)
    assert all(call.window or (call.density or 1.0) < 0.9 for call in prefill)


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_compile_leaves_generate_as_it_is(family: str) -> None:
    optimized = optimize(BY_NAME[family].create(), SELECTOR, min_length=0)
    compiled: Any = torch.compile(optimized)
    assert_same(generate(compiled, **prompt()), generate(optimized, **prompt()))
