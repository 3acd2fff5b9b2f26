"""Masks under which each row sees one run of keys, as the kernels read them.

Causality, left and right padding, sliding windows, chunks, documents and prefixes are such masks:
nothing is as large as queries times keys.

Symbols: Bm batch elements (1 where all are alike), Nq/Nk query and key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import BlockGeometry
from .masks import Hull, conjuncts, hull_of, row_spans

# Of a query block: the first and last key that some row sees, the last of the first ones and the
# first of the last ones, whether some row may be left without a key, and whether all are kept.
BLOCK_FIELDS = 6
# Of a group of rows: the first and last key that some row sees, and the rows it stands for.
ROW_FIELDS = 3
# Of a key block, added: some key is valid, all are, it is kept for every row.
ANY_VALID, ALL_VALID, FORCED = 1, 2, 4


@dataclass(frozen=True, slots=True, eq=False)
class KeyIntervals:
    """A mask and causality as intervals: each row sees the valid keys from ``first`` to ``last``.

    Attributes:
        first: int32 [Bm, Sq], the first key that a row sees; Skv where it sees none.
        last: int32 [Bm, Sq], the last one; -1 where it sees none.
        key_valid: bool [Bm, Skv], keys that no row is kept from by what hides single keys.
        gaps: bool [Bm, Sq], rows that may not see all of these: documents in pieces. All of their
            blocks are kept, none as full.
    """

    first: Tensor
    last: Tensor
    key_valid: Tensor
    gaps: Tensor

    @classmethod
    def of(cls, geometry: BlockGeometry, device: torch.device) -> KeyIntervals:
        """Those of a geometry whose mask `has_intervals`."""
        assert geometry.mask is not None
        spans = row_spans(geometry.mask, geometry.causal_offset, device)
        row = torch.arange(geometry.q_len, device=device)[None]
        hull = Hull(spans.first, spans.last, torch.zeros_like(spans.first, dtype=torch.bool))
        for part in () if spans.rest is None else conjuncts(spans.rest.expr):
            hull &= hull_of(geometry.mask, part, row)
        kv_len, valid = geometry.kv_len, spans.key_valid
        key = torch.arange(kv_len, device=device)
        # From every key on, the next valid one, and back from it the one before.
        following = torch.where(valid, key, kv_len).flip(-1).cummin(-1).values.flip(-1)
        preceding = torch.where(valid, key, -1).cummax(-1).values
        # The operator says before it runs how many there are.
        batch = geometry.mask.batch if geometry.mask.varies_in_batch else 1
        valid = valid.expand(batch, -1)
        first = hull.first.expand(batch, -1).clamp(min=0)
        last = hull.last.expand(batch, -1).clamp(max=kv_len - 1)
        beyond, before = first >= kv_len, last < 0
        first = following.expand(batch, -1).gather(1, first.clamp(max=kv_len - 1))
        last = preceding.expand(batch, -1).gather(1, last.clamp(min=0))
        sees = (first <= last) & ~beyond & ~before
        return cls(
            torch.where(sees, first, kv_len).int(),
            torch.where(sees, last, -1).int(),
            valid,
            sees & hull.gaps,
        )

    @property
    def sees(self) -> Tensor:
        """Rows that see some key: bool [Bm, Sq]."""
        return self.last >= self.first

    def of_rows(self, geometry: BlockGeometry, group: int) -> Tensor:
        """What groups of rows see: int32 [Bm, Nq * block_size / group, ROW_FIELDS]."""
        groups = geometry.num_q_blocks * (geometry.block_size // group)
        low = _grouped(self.first, groups, group, geometry.kv_len).amin(-1)
        high = _grouped(self.last, groups, group, -1).amax(-1)
        count = _grouped(self.sees.int(), groups, group, 0).sum(-1, dtype=torch.int32)
        return torch.stack([low, high, count], -1)

    def of_samples(self, geometry: BlockGeometry, step: int) -> Tensor:
        """What the last row of every ``step`` rows sees, and for how many rows it stands.

        Returns:
            int32 [Bm, Nq * block_size / step, ROW_FIELDS].
        """
        groups = geometry.num_q_blocks * (geometry.block_size // step)
        start = torch.arange(groups, device=self.first.device) * step
        row = (start + step).clamp(max=geometry.q_len) - 1
        low, high = self.first[:, row], self.last[:, row]
        exist = (geometry.q_len - start).clamp(0, step).int()
        return torch.stack([low, high, torch.where(high >= low, exist, 0)], -1)

    def of_blocks(self, geometry: BlockGeometry, last_query_blocks: int) -> Tensor:
        """What query blocks see: int32 [Bm, Nq, BLOCK_FIELDS]."""
        size, blocks, kv_len = geometry.block_size, geometry.num_q_blocks, geometry.kv_len
        first = _grouped(self.first, blocks, size, kv_len)
        last = _grouped(self.last, blocks, size, -1)
        whole_last = self.last.masked_fill(self.gaps, -1)
        whole_first = self.first.masked_fill(self.gaps, kv_len)
        lowest_last = _grouped(whole_last, blocks, size, kv_len).amin(-1)
        highest_first = _grouped(whole_first, blocks, size, -1).amax(-1)
        gaps = _grouped(self.gaps.int(), blocks, size, 0).amax(-1)
        rows = _grouped(self.sees.int(), blocks, size, 0).amax(-1) > 0
        from_end = rows.flip(-1).cumsum(-1).flip(-1)
        fields = [
            first.amin(-1),
            last.amax(-1),
            highest_first,
            lowest_last,
            _grouped(self._is_apart(geometry).int(), blocks, size, 0).amax(-1),
            torch.maximum((rows & (from_end <= last_query_blocks)).int(), gaps),
        ]
        return torch.stack(fields, -1)

    def _is_apart(self, geometry: BlockGeometry) -> Tensor:
        """Rows that see keys but perhaps none of their own blocks, which are kept: [Bm, Sq]."""
        offset = geometry.causal_offset
        if offset is None:
            if geometry.q_len != geometry.kv_len:
                return self.sees
            offset = 0
        row = torch.arange(geometry.q_len, device=self.first.device)
        own = (row + offset).clamp(max=geometry.kv_len - 1)
        seen = self.key_valid[:, own] & (self.first <= row + offset) & (self.last >= row + offset)
        return self.sees & ~seen

    def of_key_blocks(self, geometry: BlockGeometry, sink_blocks: int) -> Tensor:
        """What is true of key blocks: int32 [Bm, Nk]."""
        size, blocks = geometry.block_size, geometry.num_kv_blocks
        valid = _grouped(self.key_valid.int(), blocks, size, 0)
        some, all_ = valid.amax(-1), valid.amin(-1)
        sink = (some.cumsum(-1) <= sink_blocks).int() * some
        return (some * ANY_VALID + all_ * ALL_VALID + sink * FORCED).int()

    def weights(self, group: int, groups: int) -> Tensor:
        """Log2 of the share of each group of keys that is valid: float32 [Bm, groups]."""
        return (_grouped(self.key_valid.float(), groups, group, 0.0).mean(-1)).log2()


def _grouped(values: Tensor, groups: int, size: int, fill: float) -> Tensor:
    """[Bm, S] as [Bm, groups, size], what is missing filled in."""
    padded = F.pad(values, (0, groups * size - values.shape[-1]), value=fill)
    return padded.unflatten(-1, (groups, size))


@dataclass(frozen=True, slots=True, eq=False)
class IntervalTables:
    """What the kernels read of `KeyIntervals`, contiguous; int32 where nothing else is said.

    Attributes:
        rows: [Bm, Sq, 2], `KeyIntervals.first` and ``last``.
        composites: See `KeyIntervals.of_rows`; without rows where none are scored.
        samples: See `KeyIntervals.of_samples`; likewise.
        blocks: See `KeyIntervals.of_blocks`.
        key_blocks: See `KeyIntervals.of_key_blocks`.
        key_weights: See `KeyIntervals.weights`, of composite keys; float32.
        key_valid: bool [Bm, Skv].
        row_valid: bool [Bm, Sq], rows that see some key.
    """

    rows: Tensor
    composites: Tensor
    samples: Tensor
    blocks: Tensor
    key_blocks: Tensor
    key_weights: Tensor
    key_valid: Tensor
    row_valid: Tensor

    def tensors(self) -> list[Tensor]:
        """The tables in this order."""
        return [getattr(self, name) for name in self.__dataclass_fields__]


def interval_tables(
    geometry: BlockGeometry,
    device: torch.device,
    *,
    c_q: int,
    c_k: int,
    sampled_queries: int,
    sink_blocks: int,
    last_query_blocks: int,
) -> IntervalTables:
    """The tables of a call whose mask `has_intervals`.

    Args:
        geometry: The block grid and the mask.
        device: Where they live.
        c_q: Query rows per composite query; 0 for none.
        c_k: Keys per composite key.
        sampled_queries: Rows of a block that meet every key; 0 for none.
        sink_blocks: First key blocks with a valid key, kept for every row.
        last_query_blocks: Last query blocks of which a row sees a key; they keep every block.
    """
    found = KeyIntervals.of(geometry, device)
    size = geometry.block_size
    none = found.first.new_zeros((found.first.shape[0], 0, ROW_FIELDS))
    tables = IntervalTables(
        rows=torch.stack([found.first, found.last], -1),
        composites=found.of_rows(geometry, c_q) if c_q else none,
        samples=found.of_samples(geometry, size // sampled_queries) if sampled_queries else none,
        blocks=found.of_blocks(geometry, last_query_blocks),
        key_blocks=found.of_key_blocks(geometry, sink_blocks),
        key_weights=found.weights(c_k, geometry.num_kv_blocks * (size // c_k)),
        key_valid=found.key_valid,
        row_valid=found.sees,
    )
    return IntervalTables(*(table.contiguous() for table in tables.tensors()))
