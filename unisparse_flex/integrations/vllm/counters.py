"""How much ran sparse: counted as it runs, for the log and for whoever asks."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...counted import counted
from ...shares import say_tenths
from .reasons import Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What ran in this process since it started, or since `reset_counts`.

    A row is a request's tokens in one step, once for all layers of a rank; blocks are counted in
    every layer and query head.

    Attributes:
        sparse_rows: Prefill rows that ran sparse.
        sparse_tokens: Their tokens.
        sparse_calls: Calls of layers that attended to selected blocks.
        dense_rows: Rows that went to the parent in batches with rows of a block or more, by reason.
        dense_calls: Calls of layers that sent sparse rows to the parent all the same, by reason.
        kept_blocks: Blocks that sparse rows attended to.
        visible_blocks: Blocks that dense attention would have read for them.
        decode_rows: Rows of one token whose keys were chosen.
        kept_units: Units of keys that they attended to, in every layer and key head.
        visible_units: Units that dense attention would have read for them.
    """

    sparse_rows: int
    sparse_tokens: int
    sparse_calls: int
    dense_rows: dict[Reason, int]
    dense_calls: dict[Reason, int]
    kept_blocks: int
    visible_blocks: int
    decode_rows: int = 0
    kept_units: int = 0
    visible_units: int = 0

    @property
    def density(self) -> float:
        """Kept over visible blocks; 0 where nothing ran sparse."""
        return self.kept_blocks / self.visible_blocks if self.visible_blocks else 0.0

    @property
    def decode_density(self) -> float:
        """Kept over visible units of decoding; 0 where none was sparse."""
        return self.kept_units / self.visible_units if self.visible_units else 0.0

    def line(self) -> str:
        """One line for the log."""
        dense = ", ".join(f"{n} {reason.name}" for reason, n in sorted(self.dense_rows.items()))
        rows = counted(self.sparse_rows, "prefill row")
        blocks = counted(self.visible_blocks, "block")
        return (
            f"unisparse: {rows} of {counted(self.sparse_tokens, 'token')} sparse, "
            f"{self.kept_blocks} of {blocks} read ({say_tenths(self.density)}); "
            f"rows to the parent beside prefills: {dense or 'none'}" + self._decoding()
        )

    def _decoding(self) -> str:
        if not self.decode_rows:
            return ""
        return (
            f"; {counted(self.decode_rows, 'token')} decoded sparse, {self.kept_units} of "
            f"{counted(self.visible_units, 'unit')} of keys read "
            f"({say_tenths(self.decode_density)})"
        )


@dataclass(slots=True)
class Counting:
    """The running numbers of a process."""

    sparse_rows: int = 0
    sparse_tokens: int = 0
    sparse_calls: int = 0
    visible_blocks: int = 0
    dense_rows: Counter[Reason] = field(default_factory=Counter)
    dense_calls: Counter[Reason] = field(default_factory=Counter)
    kept: dict[torch.device, Tensor] = field(default_factory=dict)
    decode_rows: int = 0
    decode_units: dict[torch.device, Tensor] = field(default_factory=dict)
    last_line: float = 0.0
    last_rows: int = 0

    def kept_on(self, device: torch.device) -> Tensor:
        """int64 [1], to which kernels add the blocks that they keep."""
        return _numbers_on(device, self.kept, 1)

    def decode_units_on(self, device: torch.device) -> Tensor:
        """int64 [2], to which kernels add the units that decoding keeps, and could read."""
        return _numbers_on(device, self.decode_units, 2)

    def read(self) -> Counts:
        """The numbers; waits for the device."""
        return Counts(
            sparse_rows=self.sparse_rows,
            sparse_tokens=self.sparse_tokens,
            sparse_calls=self.sparse_calls,
            dense_rows=dict(self.dense_rows),
            dense_calls=dict(self.dense_calls),
            kept_blocks=sum(int(tensor.item()) for tensor in self.kept.values()),
            visible_blocks=self.visible_blocks,
            decode_rows=self.decode_rows,
            kept_units=sum(int(tensor[0].item()) for tensor in self.decode_units.values()),
            visible_units=sum(int(tensor[1].item()) for tensor in self.decode_units.values()),
        )

    def next_line(self, seconds: float) -> str | None:
        """A line for the log, where rows were sent somewhere and the last is so long ago."""
        rows = self.sparse_rows + sum(self.dense_rows.values()) + self.decode_rows
        now = time.monotonic()
        if rows == self.last_rows or now - self.last_line < seconds:
            return None
        self.last_line, self.last_rows = now, rows
        return self.read().line()

    def reset(self) -> None:
        """Starts from 0; what a graph or a kernel writes to stays the same memory."""
        self.sparse_rows = self.sparse_tokens = self.sparse_calls = self.visible_blocks = 0
        self.dense_rows.clear()
        self.dense_calls.clear()
        self.decode_rows = 0
        for tensor in (*self.kept.values(), *self.decode_units.values()):
            tensor.zero_()
        self.last_rows = 0


def _numbers_on(device: torch.device, known: dict[torch.device, Tensor], count: int) -> Tensor:
    if device not in known:
        # The engine runs in inference mode; whoever resets it need not.
        with torch.inference_mode(False):
            known[device] = torch.zeros(count, dtype=torch.int64, device=device)
    return known[device]


counting = Counting()


def read_counts() -> Counts:
    """What ran sparse in this process: the engine's own, where it runs in-process."""
    return counting.read()


def reset_counts() -> None:
    """Counts from 0 again."""
    counting.reset()
