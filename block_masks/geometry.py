"""Where blocks and composite tokens lie: lengths, block size and causal alignment.

Symbols: Nq/Nk query and key blocks, i/j their indices, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import MaskProgram, Tiles, is_known, tile_bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockGeometry:
    """The block grid of one attention call.

    Query row ``r`` stands at key position ``r + causal_offset`` and sees the keys up to and
    including that position. Lengths may be symbolic (`torch.SymInt`) while a graph is traced.

    Attributes:
        q_len: Query rows, at least 1.
        kv_len: Keys, at least 1.
        block_size: Tokens per block, for queries and keys alike.
        causal_offset: Key position of query row 0, at least 0; ``None`` where nothing is causal.
            ``kv_len - q_len`` is bottom-right alignment, 0 is top-left.
        mask: What else hides keys from rows, where that is known as a formula.
        rows_before: Query rows of the same call that come before these, whole blocks of them, and
            are computed apart (context parallel).
        rows_after: Query rows of the same call that come after these.
    """

    q_len: int
    kv_len: int
    block_size: int
    causal_offset: int | None = None
    mask: MaskProgram | None = None
    rows_before: int = 0
    rows_after: int = 0

    @property
    def num_q_blocks(self) -> int:
        """Query blocks, the last one possibly ragged."""
        return (self.q_len + self.block_size - 1) // self.block_size

    @property
    def num_kv_blocks(self) -> int:
        """Key blocks, the last one possibly ragged."""
        # Spelled unlike `num_q_blocks`: where both lengths are one symbol, Inductor of torch 2.11
        # cannot divide the square of one floor division by itself. Nothing in it is negative:
        # indices along it are then known not to be, and need no condition in Inductor's terms.
        return (2 * self.kv_len + 2 * self.block_size - 1) // (2 * self.block_size)

    @property
    def q_blocks_after(self) -> int:
        """Query blocks of the same call after these."""
        return (self.rows_after + self.block_size - 1) // self.block_size

    @property
    def is_part(self) -> bool:
        """Whether some query rows of the call are computed apart."""
        return not is_known(self.rows_before + self.rows_after == 0)

    def has_rows_for_keys(self) -> bool:
        """Whether the call has as many query rows as keys (self-attention)."""
        return self.rows_before + self.q_len + self.rows_after == self.kv_len

    def num_groups(self, q_group: int, kv_group: int) -> tuple[int, int]:
        """Groups of query rows and of keys in whole blocks; the sizes divide ``block_size``."""
        size = self.block_size
        return self.num_q_blocks * (size // q_group), self.num_kv_blocks * (size // kv_group)

    def last_positions(self, rows_per_group: int, groups: int, device: torch.device) -> Tensor:
        """Key position of the last query row of every group of rows.

        Args:
            rows_per_group: Query rows in a group (a block or a composite token).
            groups: How many groups.
            device: Where the result lives.

        Returns:
            int64 [groups]. Groups that lie wholly after ``q_len`` repeat the last row's position.
        """
        last_row = (torch.arange(groups, device=device) + 1) * rows_per_group - 1
        return last_row.clamp(max=self.q_len - 1) + (self.causal_offset or 0)

    def sees(self, b: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Which rows see which keys, position by position: causality, `mask`, the end of the keys.

        Args:
            b: Batch elements, integers; read only by a `mask`. Broadcastable with the others.
            q_idx: Query rows.
            kv_idx: Keys; of a causal grid, only those before ``kv_len``.

        Returns:
            bool, the positions' broadcast shape, or one that broadcasts to it.
        """
        if self.causal_offset is None:
            seen = kv_idx < self.kv_len
        else:
            seen = self.sees_causally(q_idx, kv_idx, self.causal_offset)
        return seen if self.mask is None else seen & self.mask.evaluate(b, q_idx, kv_idx)

    @staticmethod
    def sees_causally(q_idx: Tensor, kv_idx: Tensor, causal_offset: int | Tensor) -> Tensor:
        """Whether causality lets rows see keys, position by position.

        Args:
            q_idx: Query rows, integers; broadcastable with the keys.
            kv_idx: Keys.
            causal_offset: Key position of query row 0; a tensor where a ``mask_mod`` captures it.

        Returns:
            bool, the positions' broadcast shape.
        """
        return kv_idx <= q_idx + causal_offset

    def pairs(self, rows: Tensor, keys: Tensor) -> Tensor:
        """`sees` for each of ``rows`` with each of ``keys``, all of which exist.

        Returns:
            bool [rows, keys], with a `mask` [1 or B, 1, rows, keys].
        """
        if self.causal_offset is None:
            if self.mask is not None:
                return self.mask.pairs(rows, keys)
            return (keys < self.kv_len).expand(rows.shape[0], -1)
        seen = self.sees_causally(rows[:, None], keys[None, :], self.causal_offset)
        return seen if self.mask is None else self.mask.pairs(rows, keys) & seen

    @property
    def hides_keys(self) -> bool:
        """Whether some row may not see some key."""
        return self.causal_offset is not None or self.mask is not None

    def num_visible_keys(self, rows: int) -> int:
        """The keys that the first ``rows`` rows see at most; all keys after them are hidden."""
        if self.causal_offset is None:
            return self.kv_len
        return min(rows + self.causal_offset, self.kv_len)

    def visible(self, q_group: int, kv_group: int, device: torch.device) -> Tensor:
        """Which groups of keys some row of a group of queries may see.

        Args:
            q_group: Query rows in a group; divides ``block_size``.
            kv_group: Keys in a group; divides ``block_size``.
            device: Where the result lives.

        Returns:
            bool [Nq * block_size / q_group, Nk * block_size / kv_group]; False for groups of keys
            after ``kv_len``.
        """
        q_groups, kv_groups = self.num_groups(q_group, kv_group)
        first_key = torch.arange(kv_groups, device=device) * kv_group
        exists = first_key < self.kv_len
        if self.causal_offset is None:
            return exists[None, :].expand(q_groups, kv_groups)
        last = self.last_positions(q_group, q_groups, device)
        return exists[None, :] & (first_key[None, :] <= last[:, None])

    def visible_blocks(self, device: torch.device) -> Tensor:
        """Blocks that may hold a visible (query, key) pair: bool [Nq, Nk].

        Exact without a `mask`; with one, what some batch element may see.
        """
        visible = self.visible(self.block_size, self.block_size, device)
        if self.mask is None:
            return visible
        may, _ = self.mask_bounds(self.block_size, self.block_size, device)
        return visible & may.any(0)[0]

    def block_bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`visible_blocks` and `full_blocks` by batch element: bool [1 or B, 1, Nq, Nk]."""
        visible = self.visible(self.block_size, self.block_size, device)[None, None]
        if self.mask is None:
            return visible, self.full_blocks(device)[None, None]
        may, _ = self.mask_bounds(self.block_size, self.block_size, device)
        return visible & may, self.full_blocks(device)

    def mask_bounds(
        self, q_group: int, kv_group: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """`tile_bounds` of `mask`: bool [1 or B, 1, groups, groups] each, causality left out."""
        assert self.mask is not None
        q_groups, kv_groups = self.num_groups(q_group, kv_group)
        return tile_bounds(self.mask, Tiles(q_group, q_groups, kv_group, kv_groups), device)

    def full_blocks(self, device: torch.device) -> Tensor:
        """Blocks whose keys all exist and are visible to every row: bool [Nq, Nk].

        With a `mask`, bool [1 or B, 1, Nq, Nk], and those for which that is known. These need no
        ``mask_mod``: FlexAttention calls them full. A block on the causal diagonal or over the
        ragged end of the keys is not full.
        """
        last_key = (torch.arange(self.num_kv_blocks, device=device) + 1) * self.block_size - 1
        whole = last_key[None, :] < self.kv_len
        if self.mask is not None:
            whole = whole & self.mask_bounds(self.block_size, self.block_size, device)[1]
        if self.causal_offset is None:
            return whole.expand(*whole.shape[:-2], self.num_q_blocks, self.num_kv_blocks)
        first_row = torch.arange(self.num_q_blocks, device=device) * self.block_size
        return whole & self.sees_causally(first_row[:, None], last_key[None, :], self.causal_offset)

    def sees_own_position(self) -> bool:
        """Whether it is known that every row sees a key in its own `local_blocks`."""
        offset = self.causal_offset
        if offset is None:
            if not is_known(self.has_rows_for_keys()):
                return False
            offset = self.rows_before
        within = is_known(self.q_len + offset <= self.kv_len)
        return within and (self.mask is None or self.mask.holds_at(offset))

    def local_blocks(self, count: int, device: torch.device) -> Tensor:
        """The blocks of the rows' own positions and the ``count - 1`` blocks before them.

        A query block whose rows stand astride two key blocks owns both. Without causality the
        rows' own positions are known only in self-attention (`has_rows_for_keys`); then the
        ``count - 1`` blocks after are local too, elsewhere nothing is.

        Returns:
            bool [Nq, Nk].
        """
        shape = self.num_q_blocks, self.num_kv_blocks
        if self.causal_offset is None and not self.has_rows_for_keys():
            return torch.zeros(shape, dtype=torch.bool, device=device)
        row_block = torch.arange(shape[0], device=device)
        start = self.rows_before if self.causal_offset is None else self.causal_offset
        first = (row_block * self.block_size + start) // self.block_size
        last = self.last_positions(self.block_size, shape[0], device)
        if self.causal_offset is None:
            last = last + start
        last = last // self.block_size
        column = torch.arange(shape[1], device=device)
        # Aligned top-left with q_len > kv_len, rows outrun the keys: the last block is theirs.
        first, last = first.clamp(max=shape[1] - 1), last.clamp(max=shape[1] - 1)
        after = 0 if self.causal_offset is not None else count - 1
        after_first = column[None, :] > first[:, None] - count
        return after_first & (column[None, :] <= last[:, None] + after)
