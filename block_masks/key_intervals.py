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
from .masks import conjuncts, coordinates, hull_of, nearest_valid, row_spans

# Of a query block: the first and last key that some row sees, the last of the first ones and the
# first of the last ones, whether some row may be left without a key, and whether all are kept.
BLOCK_FIELDS = 6
# Where gaps stand among the facts of a row, if it may have some.
GAPS = 4
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
        sees: bool [Bm, Sq], rows that see some key.
        key_valid: bool [Bm, Skv], keys that no row is kept from by what hides single keys.
        gaps: bool [Bm, Sq], rows that may not see all of these: documents in pieces. All of their
            blocks are kept, none as full. ``None`` where the formula says that there are none.
    """

    first: Tensor
    last: Tensor
    sees: Tensor
    key_valid: Tensor
    gaps: Tensor | None

    @classmethod
    def of(cls, geometry: BlockGeometry, device: torch.device) -> KeyIntervals:
        """Those of a geometry whose mask `has_intervals`."""
        mask, kv_len = geometry.mask, geometry.kv_len
        assert mask is not None
        spans = row_spans(mask, geometry.causal_offset, device)
        first, last, gaps = spans.first, spans.last, None
        row = torch.arange(geometry.q_len, device=device)[None]
        for part in () if spans.rest is None else conjuncts(spans.rest.expr):
            hull = hull_of(mask, part, row)
            first, last = torch.maximum(first, hull.first), torch.minimum(last, hull.last)
            gaps = hull.gaps if gaps is None else gaps | hull.gaps
        # The operator says before it runs how many there are.
        batch = mask.batch if mask.varies_in_batch else 1
        first, last = first.expand(batch, -1), last.expand(batch, -1)
        if any(coordinates(part) in ({"kv"}, {"kv", "b"}) for part in conjuncts(mask.expr)):
            following, preceding = nearest_valid(spans.key_valid)
            # Of what lies beyond the last key, and before the first.
            following = F.pad(following, (0, 1), value=kv_len).expand(batch, -1)
            preceding = F.pad(preceding, (1, 0), value=-1).expand(batch, -1)
            first = following.gather(1, first.clamp(0, kv_len))
            last = preceding.gather(1, (last + 1).clamp(0, kv_len))
        else:
            first, last = first.clamp(min=0), last.clamp(max=kv_len - 1)
        sees = first <= last
        return cls(
            torch.where(sees, first, kv_len).int(),
            torch.where(sees, last, -1).int(),
            sees,
            spans.key_valid.expand(batch, -1),
            None if gaps is None else sees & gaps,
        )

    def is_apart(self, geometry: BlockGeometry) -> Tensor:
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
        valid = _grouped(self.key_valid.int(), blocks, size)
        some, all_ = valid.amax(-1), valid.amin(-1)
        sink = (some.cumsum(-1, dtype=torch.int32) <= sink_blocks) * some
        return some * ANY_VALID + all_ * ALL_VALID + sink * FORCED

    def weights(self, group: int, groups: int) -> Tensor:
        """Log2 of the share of each group of keys that is valid: float32 [Bm, groups]."""
        return (_grouped(self.key_valid.float(), groups, group).mean(-1)).log2()


def _grouped(values: Tensor, groups: int, size: int) -> Tensor:
    """[Bm, S] as [Bm, groups, size], what is missing 0."""
    missing = groups * size - values.shape[-1]
    padded = F.pad(values, (0, missing)) if missing else values
    return padded.unflatten(-1, (groups, size))


class _BlockRows:
    """The rows of intervals, in whole blocks: after the last one, that one again.

    Args:
        found: The intervals.
        geometry: The block grid.
    """

    def __init__(self, found: KeyIntervals, geometry: BlockGeometry) -> None:
        self._geometry = geometry
        facts = [found.first, found.last, found.sees.int(), found.is_apart(geometry).int()]
        facts += [] if found.gaps is None else [found.gaps.int()]
        rows = torch.stack(facts, 1)
        self._row = torch.arange(
            geometry.num_q_blocks * geometry.block_size, device=found.first.device
        )
        self._is_ragged = len(self._row) > geometry.q_len
        if self._is_ragged:
            rows = rows[..., self._row.clamp(max=geometry.q_len - 1)]
        # int32 [Bm, facts, Nq * block_size].
        self._rows = rows

    def groups(self, group: int) -> Tensor:
        """What groups of rows see: int32 [Bm, Nq * block_size / group, ROW_FIELDS]."""
        first, last, sees = (self._rows[:, i].unflatten(-1, (-1, group)) for i in range(3))
        low, high = first.amin(-1), last.amax(-1)
        if self._is_ragged:
            exists = (self._row < self._geometry.q_len).view(-1, group)
            sees = sees * exists
            low = torch.where(exists[:, 0], low, self._geometry.kv_len)
            high = torch.where(exists[:, 0], high, -1)
        return torch.stack([low, high, sees.sum(-1, dtype=torch.int32)], -1)

    def samples(self, step: int) -> Tensor:
        """What the last row of every ``step`` rows sees, and for how many rows it stands.

        Returns:
            int32 [Bm, Nq * block_size / step, ROW_FIELDS].
        """
        first, last, sees = (self._rows[:, i, step - 1 :: step] for i in range(3))
        start = self._row[::step]
        exist = (self._geometry.q_len - start).clamp(0, step).int()
        return torch.stack([first, last, sees * exist], -1)

    def blocks(self, last_query_blocks: int) -> Tensor:
        """What query blocks see: int32 [Bm, Nq, BLOCK_FIELDS]."""
        rows = self._rows.unflatten(-1, (-1, self._geometry.block_size))
        least, most = rows.amin(-1), rows.amax(-1)
        highest_first, lowest_last, keeps_all = most[:, 0], least[:, 1], most[:, 2] > 0
        # Last query blocks of which a row sees something.
        from_end = keeps_all.flip(-1).cumsum(-1).flip(-1)
        keeps_all = keeps_all & (from_end <= last_query_blocks)
        if self._rows.shape[1] > GAPS:
            gaps = most[:, GAPS] > 0
            highest_first = torch.where(gaps, self._geometry.kv_len, highest_first)
            lowest_last = torch.where(gaps, -1, lowest_last)
            keeps_all = keeps_all | gaps
        fields = [least[:, 0], most[:, 1], highest_first, lowest_last, most[:, 3], keeps_all.int()]
        return torch.stack(fields, -1)


@dataclass(frozen=True, slots=True, eq=False)
class IntervalTables:
    """What the kernels read of `KeyIntervals`, contiguous; int32 where nothing else is said.

    Attributes:
        rows: [Bm, Sq, 2], `KeyIntervals.first` and ``last``.
        composites: What groups of rows see; without rows where none are scored.
        samples: What the last of every so many rows sees; likewise.
        blocks: What query blocks see.
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
    rows, size = _BlockRows(found, geometry), geometry.block_size
    none = found.first.new_zeros((found.first.shape[0], 0, ROW_FIELDS))
    tables = IntervalTables(
        rows=torch.stack([found.first, found.last], -1),
        composites=rows.groups(c_q) if c_q else none,
        samples=rows.samples(size // sampled_queries) if sampled_queries else none,
        blocks=rows.blocks(last_query_blocks),
        key_blocks=found.of_key_blocks(geometry, sink_blocks),
        key_weights=found.weights(c_k, geometry.num_kv_blocks * (size // c_k)),
        key_valid=found.key_valid,
        row_valid=found.sees,
    )
    return IntervalTables(*(table.contiguous() for table in tables.tensors()))
