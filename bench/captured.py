"""Queries, keys and values of SmolLM2's layers at a real prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unisparse_flex.evaluation import (
    CaptureAttention,
    CapturedAttention,
    LoadedModel,
    TextName,
    build_prompt,
    load_smollm2,
)

Inputs = tuple[Tensor, Tensor, Tensor]


class _Capture(TorchFunctionMode):
    """Keeps the inputs of some attention calls, counted from 0."""

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers, self.count = layers, 0
        self.found: dict[int, Inputs] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            if self.count in self.layers:
                query, key, value = (tensor.detach().clone() for tensor in args[:3])
                self.found[self.count] = query, key, value
            self.count += 1
        return func(*args, **(kwargs or {}))


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
    with torch.no_grad(), _Capture(layers) as capture:
        ids = prompt.input_ids.to(loaded.device)
        loaded.model(ids, use_cache=False, logits_to_keep=1)

    def own(keys: Tensor) -> Tensor:
        # Key heads may come repeated for every query head.
        return keys[:, :: keys.shape[1] // kv_heads].contiguous()

    return {n: (q.contiguous(), own(k), own(v)) for n, (q, k, v) in capture.found.items()}
