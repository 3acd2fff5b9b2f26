"""Attention calls of a real model at a real prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unisparse_flex.evaluation import (
    CaptureAttention,
    CapturedAttention,
    LoadedModel,
    TextName,
    build_prompt,
    load_smollm2,
)


def without_copies(call: CapturedAttention, kv_heads: int) -> CapturedAttention:
    """A copy of a call whose keys and values a model may have repeated for its query heads."""
    step = call.key.shape[1] // kv_heads
    query, key, value = (
        tensor.clone(memory_format=torch.contiguous_format)
        for tensor in (call.query, call.key[:, ::step], call.value[:, ::step])
    )
    return CapturedAttention(query=query, key=key, value=value, scale=call.scale)


def capture_calls(
    loaded: LoadedModel, text: TextName, tokens: int, *, layers: Sequence[int] | None = None
) -> list[CapturedAttention]:
    """The inputs of every layer's causal call, or of these layers', at the demo's prompt."""
    prompt = build_prompt(loaded.tokenizer, text=text, tokens=tokens, depth=0.35, seed=0)
    with torch.inference_mode(), CaptureAttention(layers=layers) as capture:
        loaded.model(prompt.input_ids.to(loaded.device), use_cache=False, logits_to_keep=1)
    return capture.calls


def capture_smollm2(
    tokens: int, layers: Sequence[int], kv_heads: int, device: str
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of SmolLM2 by layer, for a prompt of the demo's prose."""
    calls = capture_calls(load_smollm2(torch.device(device)), "prose", tokens, layers=layers)
    inputs = [without_copies(call, kv_heads) for call in calls]
    return {
        layer: (call.query, call.key, call.value)
        for layer, call in zip(sorted(layers), inputs, strict=True)
    }
