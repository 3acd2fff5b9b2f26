"""XAttention: antidiagonal scores and top-p (arXiv 2503.16428, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from ...block_selection import BlockSelection
from ...geometry import BlockGeometry
from ...mask_summary import summarize
from ...scoring import compute_antidiagonal_scores
from ...selection import HeadTopP, SelectionRule, TopP
from ...selection_cost import LENGTH_POWER, SelectionCost, top_p_share
from ...validation import validate_block_size, validate_fraction, validate_int
from ..base import ForcesBlocks, RenamesFields, Selector


@dataclass(frozen=True, kw_only=True, slots=True)
class XAttention(RenamesFields, ForcesBlocks, Selector):
    """Top-p blocks by attention among strided cells, each of its mean antidiagonal logit.

    Attributes:
        block_size: Tokens per block; a power of two of at least 16.
        stride: Rows and keys of a cell; divides ``block_size``. The paper uses 8 and 16.
        top_p: Share of a row's estimated attention mass to keep, in (0, 1]. The paper's threshold.
        head_top_p: One share for each query head, instead of ``top_p``.
        sink_blocks: First key blocks, kept for every row.
        local_blocks: Diagonal block and those before it, kept for every row.
        last_query_blocks: Last query blocks, which keep every block.
    """

    block_size: int = 128
    stride: int = 8
    top_p: float = 0.9
    head_top_p: tuple[float, ...] | None = None
    sink_blocks: int = 1
    local_blocks: int = 1
    last_query_blocks: int = 0

    renamed_fields = MappingProxyType({"threshold": "top_p", "head_thresholds": "head_top_p"})

    row_independent = True

    def __post_init__(self) -> None:
        validate_block_size(self.block_size)
        validate_int(self.stride, "stride", minimum=1)
        if self.block_size % self.stride:
            raise ValueError(
                f"stride must divide block_size {self.block_size}, got {self.stride}; use a power "
                "of two up to block_size"
            )
        validate_fraction(self.top_p, "top_p")
        if self.head_top_p is not None:
            if not isinstance(self.head_top_p, tuple) or not self.head_top_p:
                raise TypeError(
                    "head_top_p must be None or a tuple of one number for each query head, "
                    f"got {self.head_top_p!r}"
                )
            for i, share in enumerate(self.head_top_p):
                validate_fraction(share, f"head_top_p[{i}]")
        _ = self.forced_blocks
        Selector.__post_init__(self)

    @property
    def rule(self) -> SelectionRule:
        """Top-p, with one share or with one for each head."""
        if self.head_top_p is not None:
            return HeadTopP(top_p=self.head_top_p)
        return TopP(top_p=self.top_p)

    @property
    def cost(self) -> SelectionCost:
        """Cells, and the density of UniSparse at the same top-p.

        The cost model counts a product of D numbers a cell, where there are ``stride`` times D;
        reading and writing the cells takes longer.
        """
        shares = self.head_top_p or (self.top_p,)
        return SelectionCost(
            c_q=self.stride,
            c_k=self.stride,
            row_blocks=self.sink_blocks + self.local_blocks,
            last_query_blocks=self.last_query_blocks,
            share=sum(map(top_p_share, shares)) / len(shares),
            share_power=LENGTH_POWER,
        )

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
            ValueError: More or fewer ``head_top_p`` than query heads.
        """
        if self.head_top_p is not None and len(self.head_top_p) != query.shape[1]:
            raise ValueError(
                "head_top_p must hold one number for each query head, got "
                f"{len(self.head_top_p)} for {query.shape[1]} heads"
            )
        stride = self.stride
        mask = summarize(attn_mask, geometry, c_q=stride, c_k=stride, device=query.device)
        scores = compute_antidiagonal_scores(
            query, key, geometry=geometry, stride=stride, scale=scale, mask=mask
        )
        return self.select_by(
            self.rule, scores, geometry=geometry, q_heads=query.shape[1], mask=mask
        )
