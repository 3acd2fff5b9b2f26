"""Whether an output is the one that attention over the kept blocks has, in float64.

Symbols: B batch, Hq/Hkv heads, Sq/Skv tokens, D/Dv head_dim.
"""

from __future__ import annotations

import math
import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import unisparse_flex
from unisparse_flex.block_masks.scoring import default_scale

PACKAGE = Path(unisparse_flex.__file__).resolve().parent.parent
# Of float64; more than any tensor here needs, and finite when squared.
LARGEST = 1e150


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What may come out of a call.

    Attributes:
        output: float64 [B, Hq, Sq, Dv].
        tolerance: How far an output in the call's dtype may be from it, [B, Hq, Sq, 1].
        must_spread: bool, where what is not finite is read with certainty.
        may_spread: bool, where it may be read, or where the dtype may overflow.
    """

    output: Tensor
    tolerance: Tensor
    must_spread: Tensor
    may_spread: Tensor


def expect(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    *,
    attn_mask: Tensor | None,
    scale: float | None,
) -> Expected:
    """Attention by its definition over the kept pairs, with the error that its dtype allows.

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D].
        value: [B, Hkv, Skv, Dv].
        kept: bool, broadcastable to [B, Hq, Sq, Skv]: blocks and causality, not the mask.
        attn_mask: As in SDPA.
        scale: As in SDPA.
    """
    dtype, kv_len = query.dtype, key.shape[2]
    group = query.shape[1] // key.shape[1]
    factor = default_scale(query.shape[3]) if scale is None else float(scale)
    q = query.double()
    k, v = (t.double().repeat_interleave(group, 1) for t in (key, value))
    pairs = kept.expand(q.shape[0], q.shape[1], q.shape[2], kv_len)
    bias = torch.zeros((), dtype=torch.float64)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        pairs = pairs & attn_mask
    elif attn_mask is not None:
        pairs = pairs & ~(attn_mask <= torch.finfo(attn_mask.dtype).min)
        bias = attn_mask.double()
    products = q @ k.transpose(-1, -2) * factor
    logits = (products + bias).masked_fill(~pairs, -math.inf)
    some = pairs.any(-1, keepdim=True)
    weights = logits.masked_fill(~some, 0.0).softmax(-1).masked_fill(~some, 0.0)
    finite_v = v.isfinite()
    output = weights @ v.masked_fill(~finite_v, 0.0)

    # Rows of nothing but -inf are 0 in some kernels and NaN in others.
    undecided = some & (logits == -math.inf).all(-1, keepdim=True)
    read = pairs.double() @ (~finite_v).double() > 0
    must = (weights.isnan().any(-1, keepdim=True) | read) & ~undecided
    if dtype in (torch.float16, torch.bfloat16):
        # SDPA's own kernel for 16 bits turns a logit of infinity into a finite output.
        own = bias.to(dtype) if bias.dim() else torch.zeros(pairs.shape, dtype=dtype)
        own = own.expand_as(pairs).masked_fill(~pairs, -math.inf)
        k_heads, v_heads = (t.repeat_interleave(group, 1) for t in (key, value))
        dense = F.scaled_dot_product_attention(
            query.contiguous(), k_heads.contiguous(), v_heads.contiguous(), own, scale=scale
        )
        must = must & ~dense.isfinite()

    compute = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32)
    limits = torch.finfo(dtype)
    spoilt = ~q.isfinite().all(-1, keepdim=True) | ~k.isfinite().all(-1).all(-1)[..., None, None]
    spoilt = spoilt | ~finite_v.all(2, keepdim=True)
    seen_bias = bias.expand_as(pairs).masked_fill(~pairs, 0.0).abs().amax(-1, keepdim=True)
    spoilt = spoilt | ~(seen_bias <= limits.max)
    size_k = (k.square().sum(-1).sqrt().masked_fill(~k.isfinite().all(-1), 0.0)).amax(-1)
    size_q = q.square().sum(-1, keepdim=True).sqrt()
    size = size_q * size_k[..., None, None] * max(1.0, abs(factor))
    largest_v = v.masked_fill(~finite_v, 0.0).abs().amax((-2, -1), keepdim=True) if v.numel() else 0
    largest = torch.as_tensor(largest_v, dtype=torch.float64).expand_as(some)
    overflow = ~(size <= min(limits.max, LARGEST) / 4) | (largest * kv_len > limits.max / 4)
    if not math.isfinite(factor) or 0 < abs(factor) < compute.tiny:
        overflow = overflow | True

    slack = 4 * (q.shape[3] + 8) * compute.eps * size_q * size_k[..., None, None] * abs(factor)
    slack = slack + 4 * limits.eps * seen_bias
    slack = slack.nan_to_num(nan=math.inf)
    share = torch.expm1(2 * slack.clamp(max=20)).clamp(max=2.0)
    share = share + 8 * limits.eps + 4 * kv_len * compute.eps
    tolerance = largest * share + 8 * limits.tiny * limits.eps
    return Expected(
        output=output,
        tolerance=tolerance,
        must_spread=must.expand_as(output) & ~overflow,
        may_spread=(must | spoilt | overflow | undecided).expand_as(output),
    )


def assert_expected(output: Tensor, expected: Expected, dtype: torch.dtype) -> None:
    """Asserts values, shape and dtype, and that what is not finite goes where it must or may."""
    assert output.shape == expected.output.shape
    assert output.dtype is dtype
    finite = output.isfinite()
    assert not (finite & expected.must_spread).any(), "a NaN or infinity was lost"
    assert not (~finite & ~expected.may_spread).any(), "a NaN or infinity came from nowhere"
    close = (output.double() - expected.output).abs() <= expected.tolerance
    # An output may be finite where its reference is not, only beside what may spread.
    judged = finite & expected.output.isfinite()
    assert (close | ~judged).all(), "an output is not that of its blocks"
    assert (expected.output.isfinite() | expected.may_spread).all()


def assert_documented(error: Exception, kind: type[Exception], message: str) -> None:
    """Asserts that the library raised ``error`` itself, with a message that says what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    assert type(error) is kind, f"{type(error).__name__}: {error}"
    assert re.search(message, str(error)), str(error)
    assert Path(frames[-1].filename).resolve().is_relative_to(PACKAGE), frames[-1]


def same(one: Any, other: Any) -> bool:
    """Whether two tensors are equal bit for bit, NaNs included."""
    return bool(torch.equal(one.isnan(), other.isnan())) and bool(
        torch.equal(one.nan_to_num(), other.nan_to_num())
    )
