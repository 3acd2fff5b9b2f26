"""Settings as advice spells them: Python's arguments, or options of the command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..command_line import CommandLine

# Of `integrations.register`.
DEFAULT_NAME = "unisparse"
# Settings that replace one another.
SELECTING = ("selector", "quality")


@dataclass(frozen=True, slots=True)
class Wording:
    """How settings are spelled.

    Attributes:
        command_line: The options of the run, for advice on the command line, such as
            ``--quality fast``; without it advice is in Python, such as
            ``optimize(model, quality='fast')``.
        registered: The name of `register` that the model has, whose settings advice then changes.
        saved: Settings in the model's configuration.
        calibrated: Whether the model's settings are those of a calibration.
        compiled: Whether the model is known to be compiled.
    """

    command_line: CommandLine | None = None
    registered: str | None = None
    saved: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = False
    compiled: bool = False

    @property
    def name_of_min_length(self) -> str:
        """The setting without a value, and where it stands if not where settings are given."""
        given = self.command_line is not None and "--min-length" in self.command_line.options
        is_read = self.command_line is not None or self.registered is not None
        if is_read and not given and "min_length" in self.saved:
            return "min_length in the model's configuration"
        return "--min-length" if self.command_line else "min_length"

    @property
    def name_of_dense_layers(self) -> str:
        """The setting without a value."""
        return "--dense-layers" if self.command_line else "dense_layers"

    def setting(self, name: str, value: Any, kept: Mapping[str, Any] | None) -> str:
        """What gives a setting a value, as a call that can be pasted, else in words.

        Args:
            name: Of an argument of `optimize`.
            value: Its value.
            kept: The other arguments that the model has; ``None`` where they are not known.
        """
        if self.command_line is not None:
            is_layers = name == "dense_layers"
            return self.dense_layers(value) if is_layers else f"--{name.replace('_', '-')} {value}"
        is_saved = self.registered is not None and bool(self.saved)
        if is_saved:
            # What is not saved stays as it is registered.
            replaced = SELECTING if name in SELECTING else (name,)
            kept = {each: self.saved[each] for each in self.saved if each not in replaced}
        if kept is None:
            return f"{self._argument(name, value)} added to your settings"
        values = {**kept, name: value}
        # A quality comes before a length, whichever is changed.
        arguments = [self._argument(each, values[each]) for each in sorted(values, reverse=True)]
        if self.registered is None:
            return f"optimize(model, {', '.join(arguments)})"
        if is_saved:
            return f"configure(model.config, {', '.join(arguments)})"
        start = [] if self.registered == DEFAULT_NAME else [repr(self.registered)]
        return f"register({', '.join([*start, *arguments])})"

    def _argument(self, name: str, value: Any) -> str:
        return self.dense_layers(value) if name == "dense_layers" else f"{name}={value!r}"

    def quality(self, name: str) -> str:
        """A setting of the dial that is in force."""
        return f"--quality {name}" if self.command_line else f"quality={name!r}"

    @property
    def use_saved(self) -> str:
        """What makes a model sparse by the settings in its configuration."""
        arguments = "".join(f", {name}={value!r}" for name, value in self.saved.items())
        return (
            "the configuration has settings, which only a registered name reads: load it after "
            f"register() with attn_implementation={DEFAULT_NAME!r}, or call "
            f"optimize(model{arguments}); then explain it again"
        )

    def calibrate(self, kl: float) -> str:
        """What calibrates the model for a KL in nats."""
        if self.command_line is not None:
            return self.command_line.write_calibrate(kl)
        return f"calibrate(model, batches, kl={kl:g})"

    def dense_layers(self, indices: Sequence[int]) -> str:
        """Layers that stay dense."""
        runs = runs_of(indices)
        if self.command_line:
            return f"--dense-layers {name_runs(runs, ',')}"
        if len(indices) <= 4:
            return f"dense_layers={tuple(indices)!r}".replace(" ", "")
        if len(runs) == 1:
            return f"dense_layers=range({indices[0]}, {indices[-1] + 1})"
        parts = [
            f"*range({first},{last + 1})"
            if last > first + 1
            else ",".join(map(str, sorted({first, last})))
            for first, last in runs
        ]
        return f"dense_layers=({','.join(parts)})"


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
