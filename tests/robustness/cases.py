"""One call of the public API as plain values, so that a falsifying example can be pasted back.

Symbols: B batch, Hq/Hkv heads, Sq/Skv tokens, D/Dv head_dim of keys and of values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CONTENTS = (
    *("normal", "zeros", "constant", "huge", "largest", "subnormal"),
    *("one nan", "one inf", "one -inf", "a token of nan", "all nan"),
)
LAYOUTS = (
    *("contiguous", "tokens first", "every second", "one head", "one token", "one batch"),
    *("overlapping", "offset"),
)
SHARING = ("none", "key is value", "all the same", "parts of one", "query overlaps key")
MASKS = ("bool", "bool rows hidden", "bool nothing", "float", "float hiding", "float rows hidden")
SPECIAL_MASKS = ("float nan", "float inf", "float huge")


@dataclass(frozen=True, kw_only=True)
class Mask:
    """An ``attn_mask``.

    Attributes:
        kind: What stands in it, one of ``MASKS`` or ``SPECIAL_MASKS``.
        whole: Which of batch, heads, queries and keys have their full size; the others have 1.
        dims: Trailing dimensions that are kept, at least as many as ``whole`` needs.
        dtype: Of a float mask.
    """

    kind: str
    whole: tuple[bool, bool, bool, bool]
    dims: int
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call that is right but for what ``fault`` names; its tensors follow from the seed."""

    batch: int
    kv_heads: int
    group: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    contents: tuple[str, str, str]
    layouts: tuple[str, str, str]
    sharing: str
    mask: Mask | None
    is_causal: bool
    causal_lower_right: bool
    scale: float | None
    selector: Any
    fault: str | None
    seed: int

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def offset(self) -> int | None:
        """The key position of query row 0, where the call is causal."""
        if self.causal_lower_right:
            return self.kv_len - self.q_len
        return 0 if self.is_causal else None

    def arguments(self) -> dict[str, Any]:
        """What `attention` takes by name, the fault left out."""
        query, key, value = self._tensors()
        return {
            "query": query,
            "key": key,
            "value": value,
            "attn_mask": None if self.mask is None else self._mask(self.mask),
            "is_causal": self.is_causal,
            "causal_lower_right": self.causal_lower_right,
            "scale": self.scale,
            "enable_gqa": self.group > 1,
        }

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (
            (self.batch, self.q_heads, self.q_len, self.head_dim),
            (self.batch, self.kv_heads, self.kv_len, self.head_dim),
            (self.batch, self.kv_heads, self.kv_len, self.value_dim),
        )
        query, key, value = (
            _lay_out(_fill(shape, content, self.dtype, generator), layout)
            for shape, content, layout in zip(shapes, self.contents, self.layouts, strict=True)
        )
        same_width = self.head_dim == self.value_dim
        square = self.group == 1 and self.q_len == self.kv_len
        if self.sharing == "key is value" and same_width:
            value = key
        elif self.sharing == "all the same" and same_width and square:
            key = value = query
        elif self.sharing == "parts of one" and same_width and square:
            query, key, value = torch.cat((query, key, value), -1).chunk(3, -1)
        elif self.sharing == "query overlaps key" and self.q_len <= self.kv_len:
            query = key.repeat_interleave(self.group, 1) if self.group > 1 else key
            query = query[:, :, self.kv_len - self.q_len :]
        return query, key, value

    def _mask(self, mask: Mask) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 1)
        full = (self.batch, self.q_heads, self.q_len, self.kv_len)
        sizes = [n if whole else 1 for n, whole in zip(full, mask.whole, strict=True)]
        shown = torch.rand(sizes, generator=generator) < 0.6
        if mask.kind.endswith("rows hidden"):
            shown &= torch.rand((*sizes[:3], 1), generator=generator) < 0.5
        elif mask.kind == "bool nothing":
            shown &= False
        shown = shown[(0,) * (4 - mask.dims)]
        if mask.kind.startswith("bool"):
            return shown
        numbers = 3 * torch.randn(shown.shape, generator=generator).to(mask.dtype)
        if mask.kind in ("float hiding", "float rows hidden"):
            lowest = torch.finfo(mask.dtype).min if self.seed % 2 else -math.inf
            numbers = numbers.masked_fill(~shown, lowest)
        elif mask.kind == "float huge":
            numbers = numbers * (0.01 * torch.finfo(mask.dtype).max)
        elif mask.kind != "float" and numbers.numel():
            numbers.flatten()[0] = math.nan if mask.kind == "float nan" else math.inf
        return numbers


def _fill(
    shape: tuple[int, ...], content: str, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    batch, heads, length, width = shape
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    steps = (batch, heads, (length + 7) // 8, width)
    drift = torch.randn(steps, generator=generator, dtype=torch.float64)
    tokens = noise + 1.5 * drift.repeat_interleave(8, dim=2)[:, :, :length]
    limits = torch.finfo(dtype)
    if content == "zeros":
        tokens = tokens * 0
    elif content == "constant":
        tokens = tokens * 0 + 0.75
    elif content == "huge":
        tokens = tokens * 300
    elif content == "largest":
        tokens = tokens.sign() * limits.max
    elif content == "subnormal":
        tokens = tokens * (limits.tiny / 8)
    tokens = tokens.to(dtype)
    if content == "all nan":
        tokens.fill_(math.nan)
    elif content.startswith(("one ", "a token")) and tokens.numel():
        b, h, s, d = (int(torch.randint(n, (), generator=generator)) for n in shape)
        if content == "a token of nan":
            tokens[b, h, s] = math.nan
        else:
            tokens[b, h, s, d] = float(content.removeprefix("one "))
    return tokens


def _lay_out(tokens: Tensor, layout: str) -> Tensor:
    """The tokens, or some of them again and again, in memory as ``layout`` says."""
    batch, heads, length, width = tokens.shape
    if layout == "tokens first":
        return tokens.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every second":
        return tokens.repeat_interleave(2, -1)[..., ::2]
    if layout == "one head":
        return tokens[:, :1].expand(-1, heads, -1, -1)
    if layout == "one token":
        return tokens[:, :, :1].expand(-1, -1, length, -1)
    if layout == "one batch":
        return tokens[:1].expand(batch, -1, -1, -1)
    if layout == "overlapping":
        # Each token begins one number behind the one before it.
        return (
            tokens.contiguous().as_strided(tokens.shape, (heads * length, length, 1, 1))
            if (tokens.numel() >= batch * heads * length + width)
            else tokens
        )
    if layout == "offset":
        return torch.cat((tokens[:, :, :1], tokens), 2)[:, :, 1:]
    return tokens
