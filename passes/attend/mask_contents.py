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


@dataclass(slots=True, eq=False)
class _Known:
    """A mask that was read.

    Attributes:
        owner: The tensor that it is, or is a view of.
        contents: What it says; ``None`` where no formula does.
        prepared: What was made of it, for each kind of call.
    """

    owner: weakref.ref[Tensor]
    contents: MaskContents | None
    prepared: dict[Hashable, list[Tensor]] = field(default_factory=dict)


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
    mask = call.attn_mask
    if type(mask) is not Tensor or not (everywhere or mask.device.type == DEVICE):
        return None
    if not call.query.numel():
        return None
    # Few queries or a short prompt are dense whatever the mask says, and cost nothing more.
    if refuse(_as_if_read(call), config) is not None:
        return None
    by_length = replace(config, min_length=config.min_length or 0)
    if refuse(call, by_length) is not None:
        return None
    if not everywhere and _obstacle(call, config) is not None:
        return None
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None
    known = _look_up(mask, q_len=call.query.shape[2], kv_len=call.key.shape[2])
    if known.contents is None:
        return None
    result = _bind(call, known.contents)
    kind = (config.encode(), call.query.shape, call.key.shape, call.query.dtype)
    prepared = known.prepared.get(kind)
    if prepared is None:
        skipped = not result.mask or keeps_window(call_geometry(result, config))
        prepared = [] if skipped else prepare_mask(result, config)
        known.prepared[kind] = prepared
    return result, prepared


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


def _look_up(mask: Tensor, *, q_len: int, kv_len: int) -> _Known:
    """What is known of a mask, which is read if nothing is."""
    owner = mask if mask._base is None else mask._base
    place = (mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, mask.device)
    key = None if mask.is_inference() else (*place, mask._version, q_len, kv_len)
    with _lock:
        found = _known.get(key)
    if found is not None and found.owner() is owner:
        return found
    with torch.no_grad():
        contents = read_mask(mask.detach(), q_len=q_len, kv_len=kv_len)
    found = _Known(weakref.ref(owner), contents)
    if key is not None:
        with _lock:
            _known[key] = found
            for old in [old for old, value in _known.items() if value.owner() is None]:
                del _known[old]
            while len(_known) > MOST:
                _known.popitem(last=False)
    return found


def _bind(call: SdpaCall, contents: MaskContents) -> SdpaCall:
    """The call under a mask that was read: a formula, or a flag where that says it all."""
    offset, text = contents.causal_offset, contents.text
    whole = call.key.shape[2] - call.query.shape[2]
    flag = not text and offset in (0, whole)
    numbers = [contents.number] if "n0" in text else []
    if offset is not None and not flag:
        causality = "(kv <= q)"
        if offset != 0:
            numbers, causality = [contents.number, offset], "(kv <= q + n1)"
        text = " & ".join([causality, *([text] if text else [])])
    return replace(
        call,
        attn_mask=None,
        is_causal=flag and offset == 0,
        causal_lower_right=flag and offset == whole != 0,
        mask=text,
        mask_tensors=list(contents.tensors) or None,
        mask_numbers=numbers or None,
    )
