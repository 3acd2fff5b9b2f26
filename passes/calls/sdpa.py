"""What an attention call is: every spelling of scaled_dot_product_attention, bound to one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ...block_masks import BlockGeometry
from ...block_masks.masks import MaskProgram
from ...block_masks.validation import validate_causality

POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
# What torch defined. The name in torch.nn.functional may be somebody's patch, which calls this one:
# it is what modes and graphs see, and what runs where a call stays dense.
TORCH_SDPA: Callable[..., torch.Tensor] = torch._C._nn.scaled_dot_product_attention
# A tuple: Dynamo looks these up in it.
SDPA_TARGETS: tuple[Callable[..., Any], ...] = (
    TORCH_SDPA,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SdpaCall:
    """The arguments of one call; tensors when it runs, `fx.Node`s in a graph.

    Attributes:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D].
        value: [B, Hkv, Skv, Dv].
        attn_mask: bool or float, broadcastable to [B, Hq, Sq, Skv].
        dropout_p: Dropout probability on the attention weights.
        is_causal: Row r sees keys up to r (top-left), as in SDPA.
        scale: Factor on the logits; 1 / sqrt(D) by default.
        enable_gqa: Allows Hkv < Hq.
        causal_lower_right: Row r sees keys up to r + Skv - Sq, so that the last row is aligned
            with the last key; not with ``is_causal``.
        mask: A mask proved from the graph, as `MaskProgram.parse` reads it; empty for none.
        mask_tensors: What the mask's ``t0, t1, ...`` stand for.
        mask_numbers: What the mask's ``n0, n1, ...`` stand for.
    """

    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    causal_lower_right: bool = False
    mask: str = ""
    mask_tensors: Sequence[Any] | None = None
    mask_numbers: Sequence[Any] | None = None

    @classmethod
    def bind(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> SdpaCall:
        """Binds positional and keyword arguments of any spelling.

        Raises:
            TypeError: The arguments are not those of scaled_dot_product_attention.
        """
        if len(args) > len(POSITIONAL):
            raise TypeError(
                f"scaled_dot_product_attention takes {len(POSITIONAL)} positional arguments, "
                f"got {len(args)}; give the rest by name"
            )
        bound = dict(zip(POSITIONAL, args, strict=False))
        if "dropout_p" not in bound and "dropout_p" not in kwargs:
            # Dynamo would compare the class's own default as a tensor, at every compiled call.
            bound["dropout_p"] = 0.0
        return cls(**bound, **kwargs)

    def map_tensors(self, of: Callable[[Any], Any]) -> SdpaCall:
        """The same call with ``of`` applied to every tensor."""
        return replace(
            self,
            query=of(self.query),
            key=of(self.key),
            value=of(self.value),
            attn_mask=None if self.attn_mask is None else of(self.attn_mask),
            mask_tensors=[of(tensor) for tensor in self.mask_tensors or ()],
        )

    def with_constants(self) -> SdpaCall:
        """The same call, symbolic numbers, flags, heads and head_dims made constants of the graph.

        No kernel takes them symbolic; a graph that did would recompile for each anyway.
        """
        for tensor in (self.query, self.key, self.value):
            if tensor.dim() != 4:
                continue
            for size in tensor.shape[1::2]:
                if type(size) is int:
                    continue
                int(size)
                if is_symbolic(size):
                    # Heads counted in batches, where one symbol stands for both.
                    int(tensor.shape[0])
        symbolic = (torch.SymFloat, torch.SymBool)
        flags = (self.is_causal, self.causal_lower_right)
        if not any(isinstance(n, symbolic) for n in (self.scale, self.dropout_p, *flags)):
            return self
        return replace(
            self,
            scale=None if self.scale is None else float(self.scale),
            dropout_p=float(self.dropout_p),
            is_causal=bool(self.is_causal),
            causal_lower_right=bool(self.causal_lower_right),
        )

    def positional(self) -> tuple[Any, ...]:
        """What every spelling takes by position, in SDPA's order."""
        return tuple(getattr(self, name) for name in POSITIONAL)

    def keywords(self) -> dict[str, Any]:
        """What the marker operator takes by name, beside its settings."""
        return {
            "scale": self.scale,
            "enable_gqa": self.enable_gqa,
            "causal_lower_right": self.causal_lower_right,
            "mask": self.mask,
            "mask_tensors": self.mask_tensors,
            "mask_numbers": self.mask_numbers,
        }

    def mask_program(self) -> MaskProgram | None:
        """The proved mask of a call that holds tensors.

        Raises:
            ValueError: A flag beside it: the mask says itself what is causal.
        """
        if not self.mask:
            return None
        if self.causal:
            raise ValueError(
                f"mask must say itself what is causal, got {self.mask!r} beside is_causal or "
                "causal_lower_right; write (kv <= q + offset) into it"
            )
        return MaskProgram.parse(
            self.mask,
            tensors=self.mask_tensors or (),
            numbers=self.mask_numbers or (),
            batch=self.query.shape[0],
            q_len=self.query.shape[2],
            kv_len=self.key.shape[2],
        )

    @property
    def causal(self) -> bool:
        """Whether a flag says that queries see the keys up to their position, however aligned."""
        return bool(self.is_causal or self.causal_lower_right)

    def causal_offset(self, q_len: int | None = None, kv_len: int | None = None) -> int | None:
        """Key position of the first query row by the flags; ``None`` where they say nothing.

        Args:
            q_len: Query rows of the whole call, where ``query`` is a part of it.
            kv_len: Its keys, where ``key`` is a part.
        """
        if self.causal_lower_right:
            rows = self.query.shape[2] if q_len is None else q_len
            return (self.key.shape[2] if kv_len is None else kv_len) - rows
        return 0 if self.is_causal else None

    def has_plain_numbers(self) -> bool:
        """Whether the mask's numbers are constants or single symbols, not computed from several.

        Only these can be handed to a region that is compiled on its own.
        """
        symbols = [n for n in self.mask_numbers or () if isinstance(n, torch.SymInt)]
        return all(symbol.node.expr.is_Symbol for symbol in symbols)

    def run_dense(self) -> torch.Tensor:
        """Runs the call as it stands, through PyTorch's own kernels.

        Raises:
            ValueError: ``causal_lower_right`` with ``is_causal`` or ``attn_mask``.
        """
        mask, is_causal = self.attn_mask, self.is_causal
        program = self.mask_program()
        if self.causal_lower_right or program is not None:
            # Read only here: what is no attention call at all meets SDPA's own error.
            q_len, kv_len = self.query.shape[-2], self.key.shape[-2]
            row = torch.arange(q_len, device=self.query.device)
            key = torch.arange(kv_len, device=self.query.device)
            if program is not None:
                mask = program.pairs(row, key)
            else:
                validate_causality(bool(is_causal), True, mask)
                is_causal, mask = bool(q_len == kv_len), None
                if not is_causal:
                    mask = BlockGeometry.sees_causally(row[:, None], key, kv_len - q_len)
        return TORCH_SDPA(
            self.query,
            self.key,
            self.value,
            mask,
            self.dropout_p,
            is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
        )


def is_symbolic(number: Any) -> bool:
    """Whether a number of a call is not known while its graph is traced."""
    return isinstance(number, torch.SymInt) and not number.node.expr.is_number


def is_sdpa(node: fx.Node) -> bool:
    """Whether ``node`` calls scaled_dot_product_attention in one of its spellings."""
    return node.op == "call_function" and node.target in SDPA_TARGETS
