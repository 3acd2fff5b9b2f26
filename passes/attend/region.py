"""Sparse attention as one region that Inductor compiles once for all layers.

Thirty layers make the same computation thirty times; inlined, each copy is traced, scheduled
and, on the CPU, compiled anew. The region also keeps a model's own operations from being fused
into the CPU flex template, which supports no fusion.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config

from ...block_masks import fix_strides
from ..calls import SdpaCall, SparseConfig
from ..decision import DenseReason, flash_obstacle, needs_grad, reads_tensors
from .sparse_attention import attend_flex, attend_masked, restore_nan, select

logger = logging.getLogger(__name__)


def compiled_once(call: SdpaCall, config: SparseConfig) -> Tensor:
    """Selects and attends; calls of equal settings, shapes and strides share one compilation.

    A call that needs a gradient is inlined: its backward is the flex operator's own. So is one
    whose mask has a computed symbolic number: only plain symbols can be handed to a region. So is
    every call of a program that AOTInductor packages: its C++ wrapper knows no regions.
    """
    if needs_grad(call) or not call.has_plain_numbers() or inductor_config.cpp_wrapper:
        return compiled_inline(call, config)
    call = _with_known_strides(call)
    tensors = [call.query, call.key, call.value]
    if call.attn_mask is not None:
        tensors.append(call.attn_mask)
    keywords = call.keywords()
    mask_tensors = keywords.pop("mask_tensors") or ()
    mask_numbers = keywords.pop("mask_numbers") or ()
    symbols = [number for number in mask_numbers if not isinstance(number, int)]
    flags = (
        *sorted(keywords.items()),
        ("is_causal", call.is_causal),
        ("tensors", len(mask_tensors)),
        ("numbers", tuple(n if isinstance(n, int) else None for n in mask_numbers)),
    )
    operands = [*tensors, *mask_tensors, *symbols]
    layouts = [
        f"{tuple(t.shape)} {t.stride()} {t.dtype} {t.device}" if isinstance(t, Tensor) else str(t)
        for t in operands
    ]
    text = " ".join([config.encode(), repr(flags), *layouts])
    name = f"unisparse_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    # Annotated for a GraphModule, traces any callable.
    run: Any = _region(config, flags)
    output: Tensor = torch.ops.higher_order.invoke_subgraph(run, name, *operands)[0]
    return restore_nan(output, call, config) if output.device.type == "cpu" else output


def _with_known_strides(call: SdpaCall) -> SdpaCall:
    """The call, with copies of tensors whose strides hold a symbol that no size of the call does.

    Such are the keys of a static cache that is larger than what it holds. A region is told sizes
    alone, and each layer's cache has a symbol of its own: with copies all layers share one.
    """
    tensors = [call.query, call.key, call.value, call.attn_mask, *(call.mask_tensors or ())]
    stated = {s for t in tensors if t is not None for s in _symbols(t.shape)}

    def apart(tensor: Tensor) -> Tensor:
        steps = (*tensor.stride(), tensor.storage_offset())
        return tensor if _symbols(steps) <= stated else _apart(tensor)

    return call.map_tensors(apart)


def _symbols(numbers: Iterable[Any]) -> set[Any]:
    """The symbols in sizes or strides."""
    symbolic = [number for number in numbers if isinstance(number, torch.SymInt)]
    return {symbol for number in symbolic for symbol in number.node.expr.free_symbols}


def compiled_inline(call: SdpaCall, config: SparseConfig) -> Tensor:
    """Selects and attends where the call stands: Inductor lowers no region inside a body."""
    if call.query.device.type != "cpu":
        return attend_flex(call, select(call, config), backend=_inline_backend(call, config))
    call = call.map_tensors(_apart)
    output = attend_flex(call, select(call, config), backend=config.backend)
    if inductor_config.cpp_wrapper:
        return output
    # Nothing may be fused into the kernel.
    return restore_nan(fix_strides([output])[0], call, config)


def _inline_backend(call: SdpaCall, config: SparseConfig) -> str:
    """The backend of a call that is no region, among what computes its mask.

    FlashAttention-4's template does not tell torch that it reads the tensors of a mask: what is
    computed beside it may be freed before. Arguments of a region are not.
    """
    if config.backend == "triton" or not reads_tensors(call.mask):
        return config.backend
    if config.backend == "flash" and flash_obstacle(call, config.selector.block_size) is None:
        raise NotImplementedError(
            "backend='flash' cannot run this call: torch does not know that it reads the tensors "
            "of the mask, and may free them before in bodies of loops and branches, and in "
            "packages; use backend='auto'"
        )
    return config.backend if config.backend == "flash" else "triton"


def compiled_in_loop(call: SdpaCall, config: SparseConfig) -> Tensor:
    """`compiled_inline` for bodies of scan and map.

    Inductor makes loops of them that ask more outputs of the flex operator than its CPU kernel has.
    """
    if call.query.device.type != "cpu":
        return compiled_inline(call, config)
    if config.min_length is None:
        logger.warning(
            "attention in the body of a scan or map stays dense: %s", DenseReason.NO_KERNEL
        )
        return call.run_dense()
    return attend_masked(call, select(call, config))


def _apart(tensor: Tensor) -> Tensor:
    """A copy: the CPU flex template of torch 2.13 takes no view of what Inductor computes."""
    return tensor.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=256)
def _region(
    config: SparseConfig, flags: tuple[tuple[str, Any], ...]
) -> Callable[..., tuple[Tensor]]:
    """The computation as a function of what differs; the same object for the same settings."""
    keywords: dict[str, Any] = dict(flags)
    tensors, numbers = keywords.pop("tensors"), keywords.pop("numbers")

    def run(*operands: Any) -> tuple[Tensor]:
        last = len(operands) - numbers.count(None)
        symbols = iter(operands[last:])
        captured = {
            "mask_tensors": operands[last - tensors : last],
            "mask_numbers": [next(symbols) if n is None else n for n in numbers],
        }
        call = SdpaCall.bind(operands[: last - tensors], {**keywords, **captured})
        return (attend_flex(call, select(call, config), backend=config.backend),)

    return run
