"""Checks of what a caller passes in; messages name argument, rule, what came and the way out."""

from __future__ import annotations

import ast
import sys

import torch
from torch import Tensor

MIN_BLOCK_SIZE = 16
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def validate_block_size(block_size: int, name: str = "block_size") -> None:
    """Raises ValueError unless FlexAttention's kernels can tile ``block_size``."""
    validate_int(block_size, name, minimum=MIN_BLOCK_SIZE)
    if block_size & (block_size - 1):
        raise ValueError(
            f"{name} must be a power of two of at least {MIN_BLOCK_SIZE}, as FlexAttention's tiles "
            f"are, got {block_size}; use 128, or 64 for finer selection"
        )


def validate_int(value: int, name: str, *, minimum: int) -> None:
    """Raises TypeError or ValueError unless ``value`` is an int of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def validate_fraction(value: float, name: str) -> None:
    """Raises TypeError or ValueError unless ``value`` is a number in (0, 1]."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {value}")


def validate_literal(value: object, name: str) -> None:
    """Raises TypeError unless ``value`` is plain: numbers, strings, None, tuples of these."""
    try:
        plain = ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError):
        plain = False
    if not plain:
        raise TypeError(
            f"{name} must be a finite number, a string, None or a tuple of these, got {value!r}"
        )


def validate_query_key(query: Tensor, key: Tensor) -> None:
    """Raises unless query [B, Hq, Sq, D] and key [B, Hkv, Skv, D] can attend to one another."""
    for name, tensor in (("query", query), ("key", key)):
        _validate_4d(tensor, name)
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}; "
                f"convert it with {name}.to(torch.bfloat16)"
            )
        if tensor.shape[-1] == 0:
            raise ValueError(
                f"{name} must have a head_dim of at least 1, got shape {_shape(tensor)}"
            )
        if tensor.shape[-2] == 0:
            raise ValueError(
                f"{name} must hold at least one token, got shape {_shape(tensor)}; "
                "skip attention where there is nothing to attend to"
            )
    _validate_same("key", key, "query", query)
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"key must have query's head_dim {query.shape[-1]}, got {key.shape[-1]} "
            f"(query {_shape(query)}, key {_shape(key)})"
        )
    if key.shape[1] == 0 or query.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            "query heads must be a multiple of key heads, both positive, "
            f"got {query.shape[1]} and {key.shape[1]} (query {_shape(query)}, "
            f"key {_shape(key)}); tensors are [batch, heads, tokens, head_dim]"
        )


def validate_value(key: Tensor, value: Tensor) -> None:
    """Raises unless value [B, Hkv, Skv, Dv] goes with key [B, Hkv, Skv, D]."""
    _validate_4d(value, "value")
    _validate_same("value", value, "key", key)
    if value.shape[1] != key.shape[1] or value.shape[2] != key.shape[2]:
        raise ValueError(
            "value must have key's heads and tokens, "
            f"got value {_shape(value)} and key {_shape(key)}"
        )


def validate_causal_lengths(q_len: int, kv_len: int) -> None:
    """Raises ValueError where ``causal_lower_right`` leaves query rows without keys."""
    if q_len > kv_len:
        raise ValueError(
            "causal_lower_right must have q_len <= kv_len (earlier rows would see nothing), got "
            f"q_len {q_len} and kv_len {kv_len}; pass the rows that have keys, or is_causal where "
            "query row 0 is aligned with key 0"
        )


def validate_attn_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> None:
    """Raises unless ``attn_mask`` is bool or floating and broadcasts to [B, Hq, Sq, Skv]."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor, got {type(attn_mask).__name__}")
    _validate_layout(attn_mask, "attn_mask")
    if attn_mask.dtype is not torch.bool and attn_mask.dtype not in FLOAT_DTYPES:
        raise TypeError(
            "attn_mask must be bool (True takes part) or float16, bfloat16, float32 or float64 "
            f"(added), got {attn_mask.dtype}; convert it with attn_mask.bool() or attn_mask.float()"
        )
    if attn_mask.device != query.device:
        raise ValueError(
            f"attn_mask must be on query's device {query.device}, got {attn_mask.device}; "
            f"move it with attn_mask.to({str(query.device)!r})"
        )
    target = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    wrong = attn_mask.dim() > 4 or any(
        have not in (1, want)
        for have, want in zip(reversed(attn_mask.shape), reversed(target), strict=False)
    )
    if wrong:
        raise ValueError(
            f"attn_mask must broadcast to [batch, heads, q_len, kv_len] = {list(target)}, "
            f"got shape {_shape(attn_mask)}"
        )


def validate_scale(scale: float | None) -> None:
    """Raises TypeError or ValueError unless ``scale`` is None or a number that a float holds."""
    if scale is None:
        return
    if not isinstance(scale, (int, float)):
        raise TypeError(
            f"scale must be a number or None, got {scale!r} of type {type(scale).__name__}"
        )
    if isinstance(scale, int) and abs(scale) > sys.float_info.max:
        raise ValueError(
            f"scale must fit a float, got an int of {scale.bit_length()} bits; give a float"
        )


def validate_causality(
    is_causal: bool, causal_lower_right: bool, attn_mask: Tensor | None = None
) -> None:
    """Raises unless at most one of the causal flags and the mask is given.

    Args:
        is_causal: A bool, or one that a graph makes symbolic.
        causal_lower_right: A bool, or one that a graph makes symbolic.
        attn_mask: Anything but ``None`` counts as given.

    Raises:
        TypeError: A flag is no bool.
        ValueError: Two are given.
    """
    for name, flag in (("is_causal", is_causal), ("causal_lower_right", causal_lower_right)):
        if not isinstance(flag, (bool, torch.SymBool)):
            raise TypeError(
                f"{name} must be True or False, got {flag!r} of type {type(flag).__name__}"
            )
        # Asked last: a symbolic flag makes a guard.
        if attn_mask is not None and flag:
            raise ValueError(
                f"attn_mask and {name} must not both be given, got both; "
                "put causality into attn_mask"
            )
    if causal_lower_right and is_causal:
        raise ValueError(
            "is_causal and causal_lower_right must not both be given, got both; keep is_causal "
            "where query row 0 is aligned with key 0 (as in SDPA), causal_lower_right where the "
            "last row is aligned with the last key"
        )


def _validate_layout(tensor: Tensor, name: str) -> None:
    if tensor.is_nested:
        raise TypeError(
            f"{name} must be one dense tensor, got a nested one; pad it, and mask the padding with "
            "attn_mask"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor, got layout {tensor.layout}; convert it with "
            f"{name}.to_dense()"
        )


def _validate_4d(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    _validate_layout(tensor, name)
    if tensor.dim() != 4:
        raise ValueError(
            f"{name} must be [batch, heads, tokens, head_dim], got {tensor.dim()} dimensions "
            f"{_shape(tensor)}; add the missing ones with unsqueeze"
        )


def _validate_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on {other_name}'s device {other.device}, got {tensor.device}; "
            f"move it with {name}.to({str(other.device)!r})"
        )
    if tensor.dtype != other.dtype:
        raise TypeError(
            f"{name} must have {other_name}'s dtype {other.dtype}, got {tensor.dtype}; "
            f"convert it with {name}.to({other.dtype})"
        )
    if tensor.shape[0] != other.shape[0]:
        raise ValueError(
            f"{name} must have {other_name}'s batch size {other.shape[0]}, got {tensor.shape[0]}"
        )


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
