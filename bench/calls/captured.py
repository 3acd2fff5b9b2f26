"""Attention calls of a real model at a real prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The tensors of one causal call.

    Attributes:
        query: [1, Hq, S, D].
        key: [1, Hkv, S, D].
        value: [1, Hkv, S, D].
        scale: Factor on the logits; ``None`` is 1 / sqrt(D).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None

    @classmethod
    def of(cls, call: CapturedAttention, kv_heads: int) -> Inputs:
        """Copies a call; heads that a model repeated for its query heads lose their copies."""
        step = call.key.shape[1] // kv_heads
        query, key, value = (
            tensor.clone(memory_format=torch.contiguous_format)
            for tensor in (call.query, call.key[:, ::step], call.value[:, ::step])
        )
        return cls(query=query, key=key, value=value, scale=call.scale)


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
    inputs = [Inputs.of(call, kv_heads) for call in calls]
    return {
        layer: (call.query, call.key, call.value)
        for layer, call in zip(sorted(layers), inputs, strict=True)
    }
