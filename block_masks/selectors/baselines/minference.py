"""MInference's vertical-slash pattern (arXiv 2407.02490)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ...block_selection import BlockSelection
from ...geometry import BlockGeometry
from ...selection_cost import SelectionCost
from ...validation import validate_block_size, validate_int
from ..base import ForcesBlocks, RenamesFields, Selector
from .last_queries import (
    attend_last,
    blocks_on_diagonals,
    keep_highest,
    select_lines,
    sum_blocks,
    sum_columns,
    sum_diagonals,
    validate_causal_only,
)

Sizes = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class MInference(RenamesFields, ForcesBlocks, Selector):
    """The columns and diagonals that the last queries attend to most, in token numbers.

    The last ``last_q`` queries attend to every key; the highest column sums and diagonal sums are
    kept (section 3.2, vertical-slash head). On the block grid a column keeps its whole block
    column, a diagonal every block that it passes through, two in a row of blocks: more is kept
    than the numbers say. Causal calls without a mask only.

    Attributes:
        block_size: Tokens per block; a power of two of at least 16.
        vertical_slash: Columns and diagonals to keep, forced ones counted first: one pair, or a
            tuple with a pair for every query head.
        last_q: Last queries that attend to every key.
        sink_tokens: First keys, whose columns are always kept.
        local_tokens: Keys up to and including a row's own position, whose diagonals are always
            kept.
        sink_blocks: First key blocks, kept for every row.
        local_blocks: Diagonal block and those before it, kept for every row.
        last_query_blocks: Last query blocks, which keep every block.
    """

    block_size: int = 128
    vertical_slash: Sizes | tuple[Sizes, ...] = (1000, 6096)
    last_q: int = 64
    sink_tokens: int = 30
    local_tokens: int = 100
    sink_blocks: int = 1
    local_blocks: int = 1
    last_query_blocks: int = 1

    renamed_fields = MappingProxyType(
        {"forced_columns": "sink_tokens", "forced_diagonals": "local_tokens"}
    )

    def __post_init__(self) -> None:
        validate_block_size(self.block_size)
        _validate_sizes(self.vertical_slash)
        validate_int(self.last_q, "last_q", minimum=1)
        validate_int(self.sink_tokens, "sink_tokens", minimum=0)
        validate_int(self.local_tokens, "local_tokens", minimum=0)
        _ = self.forced_blocks
        Selector.__post_init__(self)

    @property
    def cost(self) -> SelectionCost:
        """Columns and diagonals as if they lay side by side, and half of the rest: a guess."""
        sizes = self._sizes()
        vertical, slash = (sum(size) / len(sizes) for size in zip(*sizes, strict=True))
        lines = math.ceil(vertical / self.block_size) + math.ceil(slash / self.block_size) + 1
        return SelectionCost(
            c_q=self.block_size,
            c_k=self.block_size,
            row_blocks=max(lines, self.sink_blocks + self.local_blocks),
            last_query_blocks=self.last_query_blocks,
        )

    def _sizes(self) -> tuple[Sizes, ...]:
        """The pairs of `vertical_slash`, one alone or one for every query head."""
        first = self.vertical_slash[0]
        if isinstance(first, tuple):
            return self.vertical_slash  # type: ignore[return-value]
        return (self.vertical_slash,)  # type: ignore[return-value]

    def supports(self, *, causal: bool, masked: bool, self_attention: bool) -> bool:
        """See `Selector.supports`: the last queries must stand for all."""
        return causal and not masked

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
            ValueError: Not causal, a mask, or pairs in ``vertical_slash`` for other heads.
        """
        validate_causal_only("MInference", geometry, attn_mask)
        sizes = self._sizes()
        if len(sizes) != 1 and len(sizes) != query.shape[1]:
            raise ValueError(
                f"vertical_slash must be one pair or a pair for each of the {query.shape[1]} query "
                f"heads, got {len(sizes)} pairs"
            )
        vertical, slash = (_per_head(size, query.device) for size in zip(*sizes, strict=True))
        shares = attend_last(query, key, count=self.last_q, geometry=geometry, scale=scale)
        columns, diagonals = sum_columns(shares), sum_diagonals(shares, geometry)
        chosen = _choose(columns, vertical, self.sink_tokens)
        in_columns = sum_blocks(chosen.int(), self.block_size) > 0
        on_diagonals = blocks_on_diagonals(
            _choose(diagonals, slash, self.local_tokens), geometry, 1
        )
        keep, visible = select_lines(
            in_columns[:, :, None, :] | on_diagonals,
            query,
            columns,
            forced_blocks=self.forced_blocks,
            geometry=geometry,
        )
        return BlockSelection(keep=keep, visible=visible, geometry=geometry)


def _choose(mass: Tensor, counts: Tensor | int, forced: int) -> Tensor:
    """The first ``forced`` lines and the highest others up to ``counts``: bool like ``mass``."""
    always = torch.arange(mass.shape[-1], device=mass.device) < forced
    return keep_highest(mass.masked_fill(always, math.inf), counts) | always


def _per_head(sizes: tuple[int, ...], device: torch.device) -> Tensor | int:
    """One number as it is; several, one for every head, as int64 [H, 1]."""
    if len(sizes) == 1:
        return sizes[0]
    return torch.cat([torch.full((1, 1), size, device=device) for size in sizes])


def _validate_sizes(sizes: object) -> None:
    pairs = (
        sizes if isinstance(sizes, tuple) and sizes and isinstance(sizes[0], tuple) else (sizes,)
    )
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(
                "vertical_slash must be (columns, diagonals) or a tuple of such pairs, one for "
                f"each query head, got {sizes!r}"
            )
        for size in pair:
            validate_int(size, "vertical_slash", minimum=0)
