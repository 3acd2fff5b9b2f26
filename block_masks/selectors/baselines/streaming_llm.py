"""StreamingLLM: the first keys and a local window (arXiv 2309.17453, section 3.2).

MInference calls it the A-shape (arXiv 2407.02490, section 3.1); with the last rows dense, SCBench
calls it the tri-shape (arXiv 2412.10319).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ...block_selection import BlockSelection
from ...geometry import BlockGeometry
from ...mask_summary import MaskSummary, summarize
from ...selection import ForcedBlocks, Threshold, per_query_head, select_blocks, valid_blocks
from ...selection_cost import SelectionCost
from ...validation import validate_block_size, validate_int
from ..base import RenamesFields, Selector


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamingLLM(RenamesFields, Selector):
    """Sinks and a local window, rounded up to whole blocks; queries and keys are not looked at.

    Without causality the window reaches as far ahead as back, and needs as many queries as keys.

    Attributes:
        block_size: Tokens per block; a power of two of at least 16.
        sink_tokens: First keys, kept for every row; under a mask, the first that some row sees.
        local_tokens: Keys of the window up to and including a row's own position.
        last_query_tokens: Last query rows, which keep every block (tri-shape).
    """

    block_size: int = 128
    sink_tokens: int = 128
    local_tokens: int = 1024
    last_query_tokens: int = 0

    renamed_fields = MappingProxyType({"dense_last": "last_query_tokens"})

    def __post_init__(self) -> None:
        validate_block_size(self.block_size)
        validate_int(self.sink_tokens, "sink_tokens", minimum=0)
        validate_int(self.local_tokens, "local_tokens", minimum=1)
        validate_int(self.last_query_tokens, "last_query_tokens", minimum=0)
        Selector.__post_init__(self)

    @property
    def cost(self) -> SelectionCost:
        """The blocks of aligned rows; no scores, which the cost model takes for one per block."""
        size = self.block_size
        return SelectionCost(
            c_q=size,
            c_k=size,
            row_blocks=-(-self.sink_tokens // size) - (-(self.local_tokens - 1) // size) + 1,
            last_query_blocks=-(-self.last_query_tokens // size),
            share=0.0,
        )

    def supports(self, *, causal: bool, masked: bool, self_attention: bool) -> bool:
        """See `Selector.supports`: elsewhere the rows' own positions are unknown."""
        return causal or self_attention

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
            ValueError: The rows' own positions are unknown: not causal, lengths that differ.
        """
        if geometry.causal_offset is None and geometry.q_len != geometry.kv_len:
            raise ValueError(
                "StreamingLLM's window needs the rows' own positions: is_causal, "
                "causal_lower_right, or as many queries as keys, got q_len "
                f"{geometry.q_len} and kv_len {geometry.kv_len} without either flag; use a "
                "selector that scores keys"
            )
        size, device = geometry.block_size, query.device
        mask = summarize(attn_mask, geometry, c_q=size, c_k=size, device=device)
        chosen = self._shape(geometry, mask, device).to(torch.float32)
        keep, visible = select_blocks(
            chosen.expand(query.shape[0], -1, -1, -1),
            rule=Threshold(threshold=1.0),
            forced_blocks=ForcedBlocks(sink_blocks=0, local_blocks=1, last_query_blocks=0),
            geometry=geometry,
            mask=mask,
        )
        keep = per_query_head(keep, visible, query.shape[1])
        return BlockSelection(keep=keep, visible=visible, geometry=geometry)

    def _shape(
        self, geometry: BlockGeometry, mask: MaskSummary | None, device: torch.device
    ) -> Tensor:
        """Blocks of the shape, what nobody sees among them: bool [1 or Bm, 1, Nq, Nk]."""
        size, q_blocks, kv_blocks = (
            geometry.block_size,
            geometry.num_q_blocks,
            geometry.num_kv_blocks,
        )
        first_row = torch.arange(q_blocks, device=device) * size + (geometry.causal_offset or 0)
        last_row = geometry.last_positions(size, q_blocks, device)
        first_key = torch.arange(kv_blocks, device=device) * size
        last_key = (first_key + size).clamp(max=geometry.kv_len) - 1
        near = last_key[None, :] > first_row[:, None] - self.local_tokens
        ahead = first_key[None, :] < last_row[:, None] + self.local_tokens
        keys = _tokens(mask.key_valid if mask else None, geometry.kv_len, device)
        sinks = keys & (keys.cumsum(-1) <= self.sink_tokens)
        rows = _tokens(mask.query_valid if mask else None, geometry.q_len, device)
        from_end = rows.flip(-1).cumsum(-1).flip(-1)
        dense = rows & (from_end <= self.last_query_tokens)
        columns = valid_blocks(sinks, kv_blocks, size, device)[:, None, None, :]
        return (
            (near & ahead) | columns | valid_blocks(dense, q_blocks, size, device)[:, None, :, None]
        )


def _tokens(valid: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Tokens that take part, all where nothing is said: bool [1 or Bm, S]."""
    if valid is None:
        return torch.ones((1, length), dtype=torch.bool, device=device)
    return valid
