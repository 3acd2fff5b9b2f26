"""Queries, keys and values of SmolLM2's layers at a real prompt."""

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

Inputs = tuple[Tensor, Tensor, Tensor]


def capture_calls(loaded: LoadedModel, text: TextName, tokens: int) -> list[CapturedAttention]:
    """The inputs of every layer's causal call, in order, at the demo's prompt."""
    prompt = build_prompt(loaded.tokenizer, text=text, tokens=tokens, depth=0.35, seed=0)
    with torch.inference_mode(), CaptureAttention() as capture:
        loaded.model(prompt.input_ids.to(loaded.device), use_cache=False, logits_to_keep=1)
    return capture.calls


def capture_smollm2(
    tokens: int, layers: Sequence[int], kv_heads: int, device: str
) -> dict[int, Inputs]:
    """Inputs of attention by layer, contiguous, for a prompt of the demo's prose."""
    loaded = load_smollm2(torch.device(device))
    prompt = build_prompt(loaded.tokenizer, text="prose", tokens=tokens, depth=0.35, seed=0)
    with torch.no_grad(), CaptureAttention(layers=layers) as capture:
        ids = prompt.input_ids.to(loaded.device)
        loaded.model(ids, use_cache=False, logits_to_keep=1)

    def own(keys: Tensor) -> Tensor:
        # Key heads may come repeated for every query head.
        return keys[:, :: keys.shape[1] // kv_heads].contiguous()

    return {
        layer: (call.query.contiguous(), own(call.key), own(call.value))
        for layer, call in zip(sorted(layers), capture.calls, strict=True)
    }
