"""Which tokens of a sequence each rank holds: whole blocks, in one or two runs a piece.

Symbols: S tokens, R ranks, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..block_masks.validation import validate_block_size, validate_int


class Span(NamedTuple):
    """Consecutive tokens of a sequence: the first, and the one after the last."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceLayout:
    """How a sequence is shared out.

    A piece is cut into 2R chunks of whole blocks, as equal as blocks allow, and rank r holds
    chunks r and 2R - 1 - r (zig-zag): under a causal mask early rows see few keys and late rows
    many, and the two together are the same work everywhere. Not ``balanced``, rank r holds chunk r
    of R. A cache that grew by several prompts has several pieces, each shared out by itself.

    Attributes:
        pieces: Tokens of each piece, in order; all but the last are whole blocks.
        ranks: R.
        block_size: Tokens per block; chunks end where blocks do.
        balanced: Zig-zag.
    """

    pieces: tuple[int, ...]
    ranks: int
    block_size: int = 128
    balanced: bool = True

    def __post_init__(self) -> None:
        validate_int(self.ranks, "ranks", minimum=1)
        validate_block_size(self.block_size)
        if not isinstance(self.pieces, tuple) or not self.pieces:
            raise TypeError(f"pieces must be a tuple of token counts, got {self.pieces!r}")
        for i, tokens in enumerate(self.pieces):
            validate_int(tokens, f"pieces[{i}]", minimum=1)
            if i < len(self.pieces) - 1 and tokens % self.block_size:
                raise ValueError(
                    f"pieces[{i}] must be a multiple of block_size {self.block_size}, as only the "
                    f"last piece may end within a block, got {tokens}; prefill in whole blocks"
                )
            if -(-tokens // self.block_size) < self.ranks:
                raise ValueError(
                    f"a sequence, and each piece of one, must hold a block of {self.block_size} "
                    f"tokens for each of {self.ranks} ranks, got {tokens} tokens; use fewer ranks "
                    "for short prompts, and decode without the context"
                )

    @property
    def length(self) -> int:
        """S, over all pieces."""
        return sum(self.pieces)

    def spans(self, rank: int) -> tuple[Span, ...]:
        """The tokens that a rank holds, in the order in which it holds them."""
        return _spans(self)[rank]

    def local_length(self, rank: int) -> int:
        """Tokens that a rank holds."""
        return sum(span.length for span in self.spans(rank))

    def positions(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """Positions of a rank's tokens in the sequence, int64: what rotary embedding needs."""
        return torch.cat([torch.arange(*span, device=device) for span in self.spans(rank)])

    def blocks(self, rank: int) -> tuple[Span, ...]:
        """The blocks that a rank holds."""
        size = self.block_size
        return tuple(Span(s.start // size, -(-s.stop // size)) for s in self.spans(rank))

    def shard(self, tensor: Tensor, dim: int, rank: int) -> Tensor:
        """A rank's part of a tensor that holds the whole sequence along ``dim``.

        Raises:
            ValueError: The tensor has another length.
        """
        if tensor.shape[dim] != self.length:
            raise ValueError(
                f"tensor must have the sequence's {self.length} tokens along dim {dim}, got shape "
                f"{list(tensor.shape)}"
            )
        return torch.cat([tensor.narrow(dim, s.start, s.length) for s in self.spans(rank)], dim)

    def assemble(
        self, parts: Sequence[Tensor], dim: int, *, per_block: int | None = None
    ) -> Tensor:
        """The whole sequence from all ranks' parts, each padded after its end or not.

        Args:
            parts: One for each rank.
            dim: Where the tokens are.
            per_block: How many items stand for a block, where these are not its tokens.
        """
        found: list[tuple[int, Tensor]] = []
        for rank, part in enumerate(parts):
            at = 0
            spans = self.spans(rank)
            if per_block is not None:
                spans = tuple(Span(a * per_block, b * per_block) for a, b in self.blocks(rank))
            for span in spans:
                found.append((span.start, part.narrow(dim, at, span.length)))
                at += span.length
        return torch.cat([part for _, part in sorted(found, key=lambda item: item[0])], dim)


@lru_cache(maxsize=1024)
def _spans(layout: SequenceLayout) -> tuple[tuple[Span, ...], ...]:
    found: list[list[Span]] = [[] for _ in range(layout.ranks)]
    start = 0
    for tokens in layout.pieces:
        for rank, spans in enumerate(found):
            for chunk in _chunks(layout, rank):
                span = _chunk(layout, chunk, start, tokens)
                if not span.length:
                    continue
                if spans and spans[-1].stop == span.start:
                    spans[-1] = Span(spans[-1].start, span.stop)
                else:
                    spans.append(span)
        start += tokens
    return tuple(tuple(spans) for spans in found)


def _chunks(layout: SequenceLayout, rank: int) -> tuple[int, ...]:
    return (rank, 2 * layout.ranks - 1 - rank) if layout.balanced else (rank,)


def _chunk(layout: SequenceLayout, chunk: int, start: int, tokens: int) -> Span:
    """One of the equal chunks of a piece that begins at ``start``."""
    size, chunks = layout.block_size, layout.ranks * (2 if layout.balanced else 1)
    each, left = divmod(-(-tokens // size), chunks)
    # The last chunks get what is left: with few blocks, one for each rank.
    ends = (i * each + max(0, i - chunks + left) for i in (chunk, chunk + 1))
    first, last = (min(end * size, tokens) for end in ends)
    return Span(start + first, start + last)
