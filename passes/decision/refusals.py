"""Sparse or dense: what can be decided from shapes, dtypes and settings, with the reason."""

from __future__ import annotations

import sys
from dataclasses import replace
from enum import StrEnum

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from ...block_masks import supports_dtype
from ..calls import (
    SdpaCall,
    SparseConfig,
    is_sharded,
    is_sharded_alike,
    is_symbolic,
    shards_tokens,
    splits_group,
)
from .attention_proof import attention_failure, needs_proof
from .cost_forecast import break_even_length, call_shape, forecast

# Hopper's flex backward tiles queries and keys by 128: sparse blocks must be multiples of it.
BACKWARD_BLOCK_MULTIPLE = 128
MIN_CUDA_HEAD_DIM = 16


class DenseReason(StrEnum):
    """Why a call stays dense."""

    EXCLUDED = "layer excluded by the settings"
    DROPOUT = "dropout_p is not 0: no sparse kernel drops attention weights"
    NOT_4D = "query, key and value are not [batch, heads, tokens, head_dim]"
    NOT_DENSE = "query, key and value are not dense tensors: nested or sparse"
    FEW_QUERIES = "few queries (decoding, or a prompt shorter than a block): dense is faster"
    SHORT = "fewer keys than min_length"
    SLOWER = "the cost model predicts that dense is faster"
    KEEPS_MOST = "nine tenths of the blocks or more are expected to be kept"
    NO_KERNEL = "only masked SDPA could apply the blocks: never faster than dense"
    CPU_GRADIENT = (
        "no sparse CPU kernel has gradients: call under torch.no_grad() where none are needed"
    )
    HEADS = "heads, batch or lengths do not go together: left to SDPA's own error"
    BROADCAST = (
        "batch or heads that SDPA broadcasts: expand them; enable_gqa=True for few key heads"
    )
    DTYPE = "dtypes differ or are not floating"
    DEVICE = "not on CPU or CUDA, or on several devices"
    MASK_AND_CAUSAL = "attn_mask and a causal flag together: left to SDPA, which may refuse both"
    MASK_SHAPE = "attn_mask does not broadcast to [batch, heads, q_len, kv_len]"
    MASK_GRADIENT = "attn_mask needs a gradient"
    CAUSAL_ROWS_WITHOUT_KEYS = "causal_lower_right with more queries than keys"
    KERNEL = "FlexAttention's CUDA kernel takes float16, bfloat16 or float32 and head_dim >= 16"
    KERNEL_FAILS = "FlexAttention's kernel was found wrong on this GPU (unisparse-flex doctor)"
    BACKWARD_BLOCK = "training on CUDA needs a block_size that is a multiple of 128"
    SHARDED_TOKENS = (
        "DTensors sharded along the tokens: use unisparse_flex.distributed.ContextParallel"
    )
    SHARDED_UNLIKE = (
        "DTensors that are sharded unlike one another, or on other dimensions than heads and batch"
    )
    SPLIT_GROUP = "a GQA group is split over ranks, or ranks hold unequal numbers of heads"
    NOT_ROW_BY_ROW = "the selector needs query rows that other ranks of the context hold"
    SELECTOR = "the selector is not defined for such calls: not causal, masked or cross-attention"
    NOT_OPTIMIZED = "not inside an optimized module"
    NEEDS_WEIGHTS = "need_weights=True returns what no fused kernel computes"
    KEYS_OF_ITS_OWN = "bias_k, add_zero_attn or static keys: the module adds keys of its own"


def refuse(call: SdpaCall, config: SparseConfig) -> DenseReason | None:
    """Why this call must or should stay dense, or ``None`` where it runs sparse.

    Comparisons of symbolic lengths become guards of the traced graph; lengths that nothing is
    known about stay dense. Where ``min_length`` is ``None`` the cost model decides last: exactly
    for known lengths, by one guard on the keys for symbolic ones.

    Of a call of DTensors only the sharding is judged: each rank decides about what it holds.
    """
    if config.dense:
        return DenseReason.EXCLUDED
    # Written out, here and below: every eager call asks all of it.
    query, key, value = call.query, call.key, call.value
    for tensor in (query, key, value):
        if tensor.layout is not torch.strided or tensor.is_nested:
            return DenseReason.NOT_DENSE
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return DenseReason.NOT_4D
    if is_sharded(call):
        return refuse_sharding(call)
    if not _holds(query.shape[2] >= max(config.min_queries, 1)):
        return DenseReason.FEW_QUERIES
    if not _holds(key.shape[2] >= max(config.min_length or 0, 1)):
        return DenseReason.SHORT
    if call.dropout_p != 0.0:
        return DenseReason.DROPOUT
    reason = (
        _refuse_tensors(call)
        or _refuse_mask(call)
        or _refuse_selector(call, config)
        or _refuse_kernel(call, config)
    )
    if reason is None and config.min_length is None:
        reason = _refuse_slow(call, config)
    return reason


def refuse_sharding(call: SdpaCall) -> DenseReason | None:
    """Why the ranks cannot compute a call of DTensors each for itself; ``None`` where they can."""
    if any(tensor.dim() != 4 for tensor in (call.query, call.key, call.value)):
        # Which dimension holds heads is not known.
        return DenseReason.NOT_4D
    if shards_tokens(call):
        return DenseReason.SHARDED_TOKENS
    if not is_sharded_alike(call):
        return DenseReason.SHARDED_UNLIKE
    return DenseReason.SPLIT_GROUP if splits_group(call) else None


def needs_grad(call: SdpaCall) -> bool:
    """Whether the output must carry a gradient."""
    return torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (call.query, call.key, call.value)
    )


def flex_supports(query: Tensor, value: Tensor) -> bool:
    """Whether FlexAttention's CUDA kernel takes these tensors."""
    narrow = min(query.shape[-1], value.shape[-1]) >= MIN_CUDA_HEAD_DIM
    return narrow and query.dtype in (torch.float16, torch.bfloat16, torch.float32)


def flex_lowers(call: SdpaCall) -> bool:
    """Whether Inductor lowers the flex operator for these tensors to a block-sparse kernel."""
    if call.query.device.type == "cuda":
        return flex_supports(call.query, call.value)
    # The CPU kernel has no backward and cannot read captured tensors at dynamic lengths.
    capture_free = call.attn_mask is None and not call.mask_tensors and not needs_grad(call)
    # Nor symbolic integers: its template takes one for a size of its own where the names collide.
    numbers = (*(call.mask_numbers or ()), call.causal_offset())
    capture_free = capture_free and not any(is_symbolic(number) for number in numbers)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return capture_free and call.query.dtype in dtypes and _has_cpu_kernel()


def lacks_kernel_for_mask(call: SdpaCall) -> bool:
    """Whether its mask is all that keeps a CPU's kernel from the call: a tensor, or it reads one.

    Such is padding. Sparse the call is then slower than dense.
    """
    if call.query.device.type != "cpu" or (call.attn_mask is None and not call.mask_tensors):
        return False
    plain = replace(call, attn_mask=None, mask="", mask_tensors=None, mask_numbers=None)
    return flex_lowers(plain) and not flex_lowers(call)


def _has_cpu_kernel() -> bool:
    """Whether Inductor has a flex kernel for this CPU, as it runs in this process.

    What its `check_cpu_supported` asks: vector units of AVX2 or newer that ATEN_CPU_CAPABILITY
    does not switch off, on a system with that kernel.
    """
    vectorised = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return vectorised and sys.platform != "darwin" and not torch.xpu.is_available()


def _refuse_tensors(call: SdpaCall) -> DenseReason | None:
    query, key, value = call.query, call.key, call.value
    device, dtype = query.device, query.dtype
    if device.type not in ("cpu", "cuda") or key.device != device or value.device != device:
        return DenseReason.DEVICE
    alike = key.dtype == dtype and value.dtype == dtype
    if not supports_dtype(dtype) or not (alike or torch.is_autocast_enabled(device.type)):
        return DenseReason.DTYPE
    batch, q_heads, _, head_dim = query.shape
    key_batch, kv_heads, kv_len, key_dim = key.shape
    value_batch, value_heads, value_len, _ = value.shape
    batches = _holds(batch == key_batch) and _holds(key_batch == value_batch)
    heads = 0 < kv_heads == value_heads and (
        q_heads == kv_heads or (call.enable_gqa and q_heads > 0 and q_heads % kv_heads == 0)
    )
    if not (_holds(kv_len == value_len) and 0 < head_dim == key_dim):
        return DenseReason.HEADS
    if batches and heads:
        return None
    several = [size for size in (batch, key_batch, value_batch) if not _holds(size == 1)]
    few = [count for count in (q_heads, kv_heads, value_heads) if count != 1]
    fits = all(_holds(size == several[0]) for size in several) and (
        all(count > 0 and q_heads % count == 0 for count in (kv_heads, value_heads))
        if call.enable_gqa
        else all(count == few[0] for count in few)
    )
    return DenseReason.BROADCAST if fits else DenseReason.HEADS


def _holds(condition: bool | torch.SymBool) -> bool:
    """Whether a comparison of lengths holds; of symbolic ones it becomes a guard of the graph."""
    return condition if isinstance(condition, bool) else guard_or_false(condition)


def _refuse_mask(call: SdpaCall) -> DenseReason | None:
    # Together with is_causal, causal_lower_right counts as a mask, which it is in torch.
    masked = call.attn_mask is not None
    if (call.causal and masked) or (call.is_causal and call.causal_lower_right):
        return DenseReason.MASK_AND_CAUSAL
    q_len, kv_len = call.query.shape[2], call.key.shape[2]
    if call.causal_lower_right and not _holds(q_len <= kv_len):
        return DenseReason.CAUSAL_ROWS_WITHOUT_KEYS
    mask = call.attn_mask
    if mask is None:
        return None
    if mask.requires_grad and torch.is_grad_enabled():
        return DenseReason.MASK_GRADIENT
    if mask.layout is not torch.strided or mask.is_nested:
        return DenseReason.NOT_DENSE
    if mask.dtype is not torch.bool and not supports_dtype(mask.dtype):
        return DenseReason.DTYPE
    if mask.device != call.query.device:
        return DenseReason.DEVICE
    target = (call.query.shape[0], call.query.shape[1], q_len, kv_len)
    fits = mask.dim() <= 4 and all(
        guard_or_false(have == 1) or guard_or_false(have == want)
        for have, want in zip(reversed(mask.shape), reversed(target), strict=False)
    )
    return None if fits else DenseReason.MASK_SHAPE


def _refuse_selector(call: SdpaCall, config: SparseConfig) -> DenseReason | None:
    if config.context is not None and not config.selector.row_independent:
        return DenseReason.NOT_ROW_BY_ROW
    supported = config.selector.supports(
        causal=call.causal,
        masked=call.attn_mask is not None or bool(call.mask),
        self_attention=_holds(call.query.shape[2] == call.key.shape[2]),
    )
    return None if supported else DenseReason.SELECTOR


def _refuse_kernel(call: SdpaCall, config: SparseConfig) -> DenseReason | None:
    if call.query.device.type != "cuda":
        return None
    autocast = torch.is_autocast_enabled("cuda")
    if not autocast and not flex_supports(call.query, call.value):
        return DenseReason.KERNEL
    if needs_grad(call) and config.selector.block_size % BACKWARD_BLOCK_MULTIPLE:
        return DenseReason.BACKWARD_BLOCK
    query = call.query
    if needs_proof(query.device) and attention_failure(query.device, query.dtype):
        return DenseReason.KERNEL_FAILS
    return None


def _refuse_slow(call: SdpaCall, config: SparseConfig) -> DenseReason | None:
    if not flex_lowers(call):
        on_cpu = call.query.device.type == "cpu"
        return DenseReason.CPU_GRADIENT if on_cpu and needs_grad(call) else DenseReason.NO_KERNEL
    q_len, kv_len = call.query.shape[2], call.key.shape[2]
    shape = call_shape(call)
    found = forecast(shape, config.selector)
    if isinstance(kv_len, torch.SymInt):
        self_attention = statically_known_true(q_len == kv_len)
        length = break_even_length(shape, config.selector, self_attention=self_attention)
        pays = length is not None and guard_or_false(kv_len >= length)
    else:
        pays = found.pays
    if pays:
        return None
    # A symbolic length may pay where it was first seen, and not from there on.
    keeps_most = found.is_sparse_faster and not found.pays
    return DenseReason.KEEPS_MOST if keeps_most else DenseReason.SLOWER
