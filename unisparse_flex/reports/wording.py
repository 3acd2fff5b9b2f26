"""Settings as advice spells them: Python's arguments, or options of the command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..command_line import CommandLine


@dataclass(frozen=True, slots=True)
class Wording:
    """How settings are spelled.

    Attributes:
        command_line: The options of the run, for advice on the command line, such as
            ``--quality fast``; without it advice is in Python, such as ``quality='fast'``.
    """

    command_line: CommandLine | None = None

    @property
    def name_of_min_length(self) -> str:
        """The setting without a value."""
        return "--min-length" if self.command_line else "min_length"

    @property
    def name_of_dense_layers(self) -> str:
        """The setting without a value."""
        return "--dense-layers" if self.command_line else "dense_layers"

    @property
    def min_length_0(self) -> str:
        """What makes every call sparse that can be."""
        return f"{self.name_of_min_length}{' ' if self.command_line else '='}0"

    def quality(self, name: str) -> str:
        """A setting of the dial."""
        return f"--quality {name}" if self.command_line else f"quality={name!r}"

    def dense_layers(self, indices: Sequence[int]) -> str:
        """Layers that stay dense."""
        runs = runs_of(indices)
        if self.command_line:
            return f"--dense-layers {name_runs(runs, ',')}"
        if len(indices) > 4 and len(runs) == 1:
            return f"dense_layers=range({indices[0]}, {indices[-1] + 1})"
        return f"dense_layers={tuple(indices)!r}".replace(" ", "")


def runs_of(indices: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run of indices that follow one another."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], index
        else:
            runs.append((index, index))
    return runs


def name_runs(runs: Sequence[tuple[int, int]], between: str) -> str:
    """Runs of indices, such as ``"0-10, 20"``."""
    return between.join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
