"""Tiny models of transformers, and how tests of `SparseStaticCache` let them generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from unisparse_flex.integrations import transformers_decode, transformers_decode_device
from unisparse_flex.integrations.transformers import DecodeSelector
from unisparse_flex.integrations.transformers_names import cache_name

from .named import NAME

ALMOST_ALL = DecodeSelector(share=0.999, min_keys=0, unit=16)
FEW = DecodeSelector(budget=64, min_keys=0, unit=16, sink_keys=16, last_keys=16)
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "head_dim": 16,
}


def create(family: str, *, window: int | None = None, sharpness: float = 1, **sizes: int) -> Any:
    """A model under the registered name, with the same weights every time.

    Args:
        family: "llama"; "mistral", with the window in all layers, or "gemma", in the first one.
        window: Keys of a sliding window.
        sharpness: What weights of queries and of keys are multiplied by.
        sizes: Settings of the model other than `SIZES`.
    """
    of_model = {**SIZES, **sizes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "mistral":
            mistral = MistralConfig(**of_model, sliding_window=window)
            model: Any = MistralForCausalLM(mistral)
        elif family == "gemma":
            types = ["sliding_attention", "full_attention"]
            gemma = Gemma3TextConfig(**of_model, sliding_window=window, layer_types=types)
            model = Gemma3ForCausalLM(gemma)
        else:
            model = LlamaForCausalLM(LlamaConfig(**of_model))
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(sharpness)
        layer.self_attn.k_proj.weight.data.mul_(sharpness)
    model.set_attn_implementation(NAME)
    return model.eval()


def read_by_python(patch: pytest.MonkeyPatch) -> None:
    """Parts of caches are chosen in Python, and never taken to be slower than the whole."""
    patch.setattr(transformers_decode, "DEVICES", ())
    patch.setattr(transformers_decode, "CHOICE_BYTES", 0)
    patch.setattr(transformers_decode, "COPY", 0)


def read_by_operators(patch: pytest.MonkeyPatch) -> None:
    """Operators choose, on a CPU too, as for a device that is not waited for; from any cache."""
    patch.setattr(transformers_decode, "DEVICES", ("cpu", "cuda"))
    patch.setattr(transformers_decode_device, "FEW_BYTES", 0)


def prompt(length: int, batch: int = 1) -> Tensor:
    """Ids [batch, length] at random."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=generator)


def generate(model: Any, ids: Tensor, cache: Any, **options: Any) -> Any:
    """Eight tokens after a prompt, and their scores."""
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


def assert_alike(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Asserts that two calls of `generate` found the same tokens, with the same scores."""
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
