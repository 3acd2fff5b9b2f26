"""DenseSpan: another selector's blocks, with the text of a sequence of patches left dense."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..block_selection import BlockSelection
from ..geometry import BlockGeometry
from ..selection_cost import SelectionCost
from .base import Selector


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseSpan(Selector):
    """A selector's blocks, and every block of the rows and keys of a span of tokens.

    For self-attention over tokens of two kinds, text and patches, say. Whole blocks are kept: a
    block that holds one token of the span counts as the span's.

    Attributes:
        selector: Which blocks are kept otherwise.
        tokens: The span as ``"first:stop"``, ``stop`` not included; what lies after a call's end
            is ignored. A text, so that it stays a constant where a traced model makes the selector.
        rows: Blocks of queries that hold the span keep every key that they may see.
        keys: Blocks of keys that hold the span are kept for every query that may see them.
    """

    selector: Selector
    tokens: str
    rows: bool = True
    keys: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.selector, Selector):
            raise TypeError(
                "selector must be a selector such as UniSparse(top_p=0.95), "
                f"got {self.selector!r} of type {type(self.selector).__name__}"
            )
        if not isinstance(self.tokens, str):
            raise TypeError(
                f'tokens must be a text "first:stop", got {self.tokens!r} of type '
                f"{type(self.tokens).__name__}"
            )
        ends = self.tokens.split(":")
        digits = all([end.isascii() and end.isdigit() for end in ends])
        if len(ends) != 2 or not digits or int(ends[0]) >= int(ends[1]):
            raise ValueError(
                'tokens must be a text "first:stop" with 0 <= first < stop, got '
                f"{self.tokens!r}; where there are none use only the inner selector"
            )
        for name in ("rows", "keys"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        # Nothing is left to check, and Dynamo may trace this: patch_attention makes one in a model.
        self._keep_text()

    @property
    def block_size(self) -> int:  # type: ignore[override]
        """Tokens per block, as the inner selector has it."""
        return self.selector.block_size

    @property
    def span(self) -> tuple[int, int]:
        """First token, and the one after the last."""
        first, stop = self.tokens.split(":")
        return int(first), int(stop)

    @property
    def cost(self) -> SelectionCost:
        """That of the inner selector, with the blocks of the span kept."""
        inner = self.selector.cost
        size, (start, stop) = self.block_size, self.span
        blocks = -(-stop // size) - start // size
        return replace(
            inner,
            row_blocks=inner.row_blocks + blocks * self.keys,
            last_query_blocks=inner.last_query_blocks + blocks * self.rows,
        )

    def supports(self, *, causal: bool, masked: bool, self_attention: bool) -> bool:
        """See `Selector.supports`: queries and keys must be the same tokens."""
        inner = self.selector.supports(causal=causal, masked=masked, self_attention=self_attention)
        return inner and self_attention

    def compute_selection(
        self,
        query: Tensor,
        key: Tensor,
        *,
        geometry: BlockGeometry,
        scale: float,
        attn_mask: Tensor | None,
    ) -> BlockSelection:
        """See `Selector.compute_selection`.

        Raises:
            ValueError: As many queries as keys are needed.
        """
        if geometry.q_len != geometry.kv_len:
            raise ValueError(
                "DenseSpan must have as many queries as keys, got q_len "
                f"{geometry.q_len} and kv_len {geometry.kv_len}; use the inner selector here"
            )
        inner = self.selector.compute_selection(
            query, key, geometry=geometry, scale=scale, attn_mask=attn_mask
        )
        size, (start, stop) = geometry.block_size, self.span
        first = torch.arange(geometry.num_kv_blocks, device=query.device) * size
        holds = (first < stop) & (first + size > start)
        forced = (holds[:, None] & self.rows) | (holds[None, :] & self.keys)
        return BlockSelection(
            keep=inner.keep | (forced & inner.visible), visible=inner.visible, geometry=geometry
        )
