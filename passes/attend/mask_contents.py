"""Mask tensors of eager calls, read once and taken for the formulas that they spell out.

A model that runs eagerly hands attention a tensor of pairs. Kernels want to know what it says:
causality, and which keys are padding, is two small tensors instead of one of all pairs.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...block_masks.kernels import read_mask
from ...block_masks.masks import MaskContents
from ..calls import SdpaCall, SparseConfig
from ..decision import refuse
from .alignment import prepare_mask
from .sparse_attention import apply_autocast, call_geometry, keeps_window, logit_scale

# Where kernels read formulas.
DEVICE = "cuda"
# Masks that are remembered: a model has one or two, of full attention and of a window.
MOST = 8


# Fields of a call under a mask that was read, and what `prepare_mask` made of the mask.
_Read = tuple[dict[str, Any], list[Tensor]]


@dataclass(slots=True, eq=False)
class _Known:
    """A mask that was read.

    Attributes:
        owner: The tensor that it is, or is a view of.
        contents: What it says; ``None`` where no formula does.
        calls: What becomes of each kind of call; ``None`` for one that runs as it stands.
    """

    owner: weakref.ref[Tensor]
    contents: MaskContents | None
    calls: dict[Hashable, _Read | None] = field(default_factory=dict)


_known: OrderedDict[Hashable, _Known] = OrderedDict()
_lock = threading.Lock()


def read_call(
    call: SdpaCall, config: SparseConfig, *, everywhere: bool = False
) -> tuple[SdpaCall, list[Tensor]] | None:
    """An eager call with a formula in place of its mask tensor, and what was made of the mask.

    The tensor is read when it is first seen, and again after it was changed in place; the layers
    of a model share what was found. A mask of an inference-mode model is read at every call:
    nothing tells when it changes.

    Args:
        call: A call of real tensors.
        config: Its settings.
        everywhere: Whether it is read on every device and for every selector, as a compiled graph
            proves it; otherwise only where kernels read the formula.

    Returns:
        The call, and what `prepare_mask` makes of it; ``None`` for one that is to run as it
        stands: without a mask tensor or the kernels that read formulas, dense whatever the mask
        says, while a CUDA graph is captured, or under a mask that no formula says.
    """
    mask, query, key = call.attn_mask, call.query, call.key
    if type(mask) is not Tensor or not (everywhere or mask.device.type == DEVICE):
        return None
    for tensor in (query, key, call.value, mask):
        if tensor.layout is not torch.strided or tensor.is_nested:
            return None
    if query.dim() != 4 or key.dim() != 4 or not query.numel():
        return None
    # Of what a transform wraps nothing may be asked unless it is to be read.
    wrapped = torch._C._functorch.peek_interpreter_stack() is not None
    if wrapped and not _may_read(call, config, everywhere=everywhere):
        return None
    if mask.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    place, kind = _place(mask, query.shape[2], key.shape[2]), _kind(call, config, everywhere)
    known = _find(mask, place)
    if known is None or kind not in known.calls:
        if not _may_read(call, config, everywhere=everywhere):
            return None
        known = known or _read(mask, place, q_len=query.shape[2], kv_len=key.shape[2])
        known.calls[kind] = _prepare(call, config, known.contents)
    read = known.calls[kind]
    return None if read is None else (replace(call, **read[0]), read[1])


def _may_read(call: SdpaCall, config: SparseConfig, *, everywhere: bool) -> bool:
    """Whether anything depends on what the mask of a call says."""
    if everywhere:
        # Also why a call stays dense: under padding a CPU has no kernel, under a window it does.
        return refuse(call, replace(config, min_length=0)) is None
    # Few queries or a short prompt are dense whatever the mask says, and cost nothing more.
    if refuse(_as_if_read(call), config) is not None:
        return False
    by_length = replace(config, min_length=config.min_length or 0)
    return refuse(call, by_length) is None and _obstacle(call, config) is None


def _prepare(call: SdpaCall, config: SparseConfig, contents: MaskContents | None) -> _Read | None:
    """What becomes of the call, and of others of its kind."""
    if contents is None:
        return None
    fields = _formula(call, contents)
    result = replace(call, **fields)
    skipped = not result.mask or keeps_window(call_geometry(result, config))
    return fields, [] if skipped else prepare_mask(result, config)


def _kind(call: SdpaCall, config: SparseConfig, everywhere: bool) -> Hashable:
    """All of a call but its numbers that decides whether its mask is read, and what follows."""
    query, key, value = call.query, call.key, call.value
    device = query.device.type
    return (
        config.encode(),
        everywhere,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        *((t.shape, t.dtype, t.device, t.requires_grad) for t in (query, key, value)),
        call.attn_mask.requires_grad,
        call.dropout_p,
        call.scale,
        call.enable_gqa,
        call.is_causal,
        call.causal_lower_right,
    )


def _as_if_read(call: SdpaCall) -> SdpaCall:
    """The call as it may be once its mask is read; what it costs does not depend on tensors."""
    behind = call.key.shape[2] - call.query.shape[2] if call.query.dim() == 4 else -1
    causality = f"(kv <= q + {behind}) & " if behind >= 0 else ""
    return replace(call, attn_mask=None, mask=f"{causality}(t0[b, kv])")


def _obstacle(call: SdpaCall, config: SparseConfig) -> str | None:
    """Why no kernel would read the formula."""
    plain = apply_autocast(replace(call, attn_mask=None, is_causal=True))
    return config.selector.kernel_obstacle(
        plain.query,
        plain.key,
        geometry=call_geometry(plain, config),
        scale=logit_scale(plain),
        attn_mask=None,
    )


def _place(mask: Tensor, q_len: int, kv_len: int) -> Hashable:
    """Where a mask lies, and as of which change; ``None`` where nothing tells when it changes."""
    if mask.is_inference():
        return None
    place = (mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, mask.device)
    return (*place, mask._version, q_len, kv_len)


def _owner(mask: Tensor) -> Tensor:
    """The tensor that a mask is, or is a view of."""
    return mask if mask._base is None else mask._base


def _find(mask: Tensor, place: Hashable) -> _Known | None:
    """What is known of a mask."""
    with _lock:
        found = _known.get(place)
    return found if found is not None and found.owner() is _owner(mask) else None


def _read(mask: Tensor, place: Hashable, *, q_len: int, kv_len: int) -> _Known:
    """Reads a mask."""
    with torch.no_grad():
        contents = read_mask(mask.detach(), q_len=q_len, kv_len=kv_len)
    found = _Known(weakref.ref(_owner(mask)), contents)
    if place is not None:
        with _lock:
            _known[place] = found
            for old in [old for old, value in _known.items() if value.owner() is None]:
                del _known[old]
            while len(_known) > MOST:
                _known.popitem(last=False)
    return found


def _formula(call: SdpaCall, contents: MaskContents) -> dict[str, Any]:
    """Fields of a call under a mask that was read: a formula, or a flag where that says it all."""
    offset, text = contents.causal_offset, contents.text
    whole = call.key.shape[2] - call.query.shape[2]
    flag = not text and offset in (0, whole)
    numbers = [contents.number] if "n0" in text else []
    if offset is not None and not flag:
        causality = "(kv <= q)"
        if offset != 0:
            numbers, causality = [contents.number, offset], "(kv <= q + n1)"
        text = " & ".join([causality, *([text] if text else [])])
    return {
        "attn_mask": None,
        "is_causal": flag and offset == 0,
        "causal_lower_right": flag and offset == whole != 0,
        "mask": text,
        "mask_tensors": list(contents.tensors) or None,
        "mask_numbers": numbers or None,
    }
