"""Sparse attention as one region that Inductor compiles once for all layers.

Thirty layers make the same computation thirty times; inlined, each copy is traced, scheduled
and, on the CPU, compiled anew. The region also keeps a model's own operations from being fused
into the CPU flex template, which supports no fusion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

from .config import SparseConfig
from .decision import needs_grad
from .sdpa import SdpaCall
from .sparse_attention import attend_flex, select


def compiled_once(call: SdpaCall, config: SparseConfig) -> Tensor:
    """Selects and attends; calls of equal settings, shapes and strides share one compilation.

    A call that needs a gradient is inlined: its backward is the flex operator's own.
    """
    if needs_grad(call):
        return attend_flex(call, select(call, config))
    tensors = [call.query, call.key, call.value]
    if call.attn_mask is not None:
        tensors.append(call.attn_mask)
    keywords = call.keywords()
    mask_tensors = keywords.pop("mask_tensors") or ()
    mask_numbers = keywords.pop("mask_numbers") or ()
    flags = (
        *sorted(keywords.items()),
        ("is_causal", call.is_causal),
        ("captured", (len(mask_tensors), len(mask_numbers))),
    )
    operands = [*tensors, *mask_tensors, *mask_numbers]
    layouts = [
        f"{tuple(t.shape)} {t.stride()} {t.dtype} {t.device}" if isinstance(t, Tensor) else str(t)
        for t in operands
    ]
    text = " ".join([config.encode(), repr(flags), *layouts])
    name = f"unisparse_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    # Annotated for a GraphModule, traces any callable.
    run: Any = _region(config, flags)
    return invoke_subgraph(run, name, *operands)[0]


@lru_cache(maxsize=256)
def _region(
    config: SparseConfig, flags: tuple[tuple[str, Any], ...]
) -> Callable[..., tuple[Tensor]]:
    """The computation as a function of what differs; the same object for the same settings."""
    keywords: dict[str, Any] = dict(flags)
    tensors, numbers = keywords.pop("captured")

    def run(*operands: Any) -> tuple[Tensor]:
        first, last = len(operands) - tensors - numbers, len(operands) - numbers
        captured = {"mask_tensors": operands[first:last], "mask_numbers": operands[last:]}
        call = SdpaCall.bind(operands[:first], {**keywords, **captured})
        return (attend_flex(call, select(call, config)),)

    return run
