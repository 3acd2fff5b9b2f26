"""Sparse or dense: what can be decided from shapes, dtypes and settings, with the reason."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..block_masks.scoring import supports_dtype
from .config import SparseConfig
from .sdpa import SdpaCall

# Hopper's flex backward tiles queries and keys by 128: sparse blocks must be multiples of it.
BACKWARD_BLOCK_MULTIPLE = 128
MIN_CUDA_HEAD_DIM = 16
# Keys from which the whole, selection included, has been measured to be no slower than dense.
BREAK_EVEN_LENGTH = {"cpu": 4096, "cuda": 32768}


class Reason(StrEnum):
    """Why a call stays dense."""

    EXCLUDED = "layer excluded by dense_layers"
    DROPOUT = "dropout_p > 0: no sparse kernel drops attention weights"
    NOT_4D = "query, key and value are not [batch, heads, tokens, head_dim]"
    FEW_QUERIES = "few queries (decoding): dense is faster"
    SHORT = "fewer keys than min_length (or than the device's break-even): dense is faster"
    HEADS = "heads, batch or lengths do not go together: left to SDPA's own error"
    DTYPE = "dtypes differ or are not floating"
    DEVICE = "not on CPU or CUDA, or on several devices"
    MASK_AND_CAUSAL = "attn_mask and is_causal together: left to SDPA's own error"
    MASK_SHAPE = "attn_mask does not broadcast to [batch, heads, q_len, kv_len]"
    MASK_GRADIENT = "attn_mask needs a gradient"
    CAUSAL_ROWS_WITHOUT_KEYS = "bottom-right causal with more queries than keys"
    KERNEL = "FlexAttention's CUDA kernel takes float16, bfloat16 or float32 and head_dim >= 16"
    BACKWARD_BLOCK = "training on CUDA needs a block_size that is a multiple of 128"
    NOT_OPTIMIZED = "not inside an optimized module"
    NEEDS_WEIGHTS = "need_weights=True returns what no fused kernel computes"
    KEYS_OF_ITS_OWN = "bias_k, add_zero_attn or static keys: the module adds keys of its own"


def refuse(call: SdpaCall, config: SparseConfig) -> Reason | None:
    """Why this call must or should stay dense, or ``None`` where it runs sparse.

    Comparisons of symbolic lengths become guards of the traced graph; lengths that nothing is
    known about stay dense.
    """
    if config.dense:
        return Reason.EXCLUDED
    query, key, value = call.query, call.key, call.value
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return Reason.NOT_4D
    if not guard_or_false(query.shape[2] >= max(config.min_queries, 1)):
        return Reason.FEW_QUERIES
    min_length = config.min_length
    if min_length is None:
        min_length = BREAK_EVEN_LENGTH.get(query.device.type, 0)
    if not guard_or_false(key.shape[2] >= max(min_length, 1)):
        return Reason.SHORT
    if call.dropout_p > 0.0:
        return Reason.DROPOUT
    return _refuse_tensors(call) or _refuse_mask(call) or _refuse_kernel(call, config)


def needs_grad(call: SdpaCall) -> bool:
    """Whether the output must carry a gradient."""
    return torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (call.query, call.key, call.value)
    )


def flex_takes(query: Tensor, value: Tensor) -> bool:
    """Whether FlexAttention's CUDA kernel takes these tensors."""
    narrow = min(query.shape[-1], value.shape[-1]) >= MIN_CUDA_HEAD_DIM
    return narrow and query.dtype in (torch.float16, torch.bfloat16, torch.float32)


def _refuse_tensors(call: SdpaCall) -> Reason | None:
    query, key, value = call.query, call.key, call.value
    if query.device.type not in ("cpu", "cuda") or {key.device, value.device} != {query.device}:
        return Reason.DEVICE
    autocast = torch.is_autocast_enabled(query.device.type)
    if not supports_dtype(query.dtype) or (
        not autocast and {key.dtype, value.dtype} != {query.dtype}
    ):
        return Reason.DTYPE
    batches = guard_or_false(query.shape[0] == key.shape[0]) and guard_or_false(
        key.shape[0] == value.shape[0]
    )
    lengths = guard_or_false(key.shape[2] == value.shape[2])
    heads = key.shape[1] == value.shape[1] and (
        query.shape[1] == key.shape[1]
        or (call.enable_gqa and key.shape[1] > 0 and query.shape[1] % key.shape[1] == 0)
    )
    if not (batches and lengths and heads and query.shape[3] == key.shape[3]):
        return Reason.HEADS
    return None


def _refuse_mask(call: SdpaCall) -> Reason | None:
    q_len, kv_len = call.query.shape[2], call.key.shape[2]
    if call.is_causal:
        if call.attn_mask is not None:
            return Reason.MASK_AND_CAUSAL
        if call.causal_lower_right and not guard_or_false(q_len <= kv_len):
            return Reason.CAUSAL_ROWS_WITHOUT_KEYS
    mask = call.attn_mask
    if mask is None:
        return None
    if mask.requires_grad and torch.is_grad_enabled():
        return Reason.MASK_GRADIENT
    if mask.dtype is not torch.bool and not mask.dtype.is_floating_point:
        return Reason.DTYPE
    if mask.device != call.query.device:
        return Reason.DEVICE
    target = (call.query.shape[0], call.query.shape[1], q_len, kv_len)
    fits = mask.dim() <= 4 and all(
        guard_or_false(have == 1) or guard_or_false(have == want)
        for have, want in zip(reversed(mask.shape), reversed(target), strict=False)
    )
    return None if fits else Reason.MASK_SHAPE


def _refuse_kernel(call: SdpaCall, config: SparseConfig) -> Reason | None:
    if call.query.device.type != "cuda":
        return None
    autocast = torch.is_autocast_enabled("cuda")
    if not autocast and not flex_takes(call.query, call.value):
        return Reason.KERNEL
    if needs_grad(call) and config.selector.block_size % BACKWARD_BLOCK_MULTIPLE:
        return Reason.BACKWARD_BLOCK
    return None
