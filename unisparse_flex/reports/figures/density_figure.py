"""Density by layer, of one run or several, and how far its heads are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...counted import counted
from ...shares import say_tenths
from .block_maps import LayerBlocks
from .style import COLORS, DASHES, FAINT, MARKERS, save, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (7.5, 3.6)


@dataclass(frozen=True, kw_only=True, slots=True)
class DensitySeries:
    """The densities of one run.

    Attributes:
        name: As the legend calls it.
        densities: Kept over visible blocks of each call in [0, 1]; ``None`` for a dense one.
        heads: The densities of each call's heads; empty where they are not known.
    """

    name: str
    densities: tuple[float | None, ...]
    heads: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.densities:
            raise ValueError(f"densities must hold at least one call, got none for {self.name!r}")
        if self.heads and len(self.heads) != len(self.densities):
            raise ValueError(
                f"heads must be as many as densities ({len(self.densities)}), got {len(self.heads)}"
            )

    @classmethod
    def of(cls, name: str, blocks: Sequence[LayerBlocks]) -> DensitySeries:
        """The densities of what `collect_blocks` returned."""
        heads = tuple(tuple(layer.head_densities()) for layer in blocks)
        means = tuple(sum(each) / len(each) if each else None for each in heads)
        return cls(name=name, densities=means, heads=heads)


def draw_densities(series: Sequence[DensitySeries], path: Path, *, title: str) -> Path:
    """Draws density over the attention calls of each run.

    The mean of a call's heads is a marker, from the least to the most of them a bar, where there
    is one run alone; dense calls are open markers at 100%.

    Args:
        series: At least one run.
        path: Of the file.
        title: What was read.

    Returns:
        ``path``.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots()
    for place, one in enumerate(series):
        _draw_series(axes, one, place, spans=len(series) == 1)
    calls = max(len(one.densities) for one in series)
    axes.set_xlim(-0.6, calls - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("attention call, in the model's order", fontsize=9)
    axes.set_ylabel("density: kept over visible blocks", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    tidy(axes)
    axes.set_title(title, fontsize=10)
    lines, names = axes.get_legend_handles_labels()
    columns = 1 if len(series) > 1 else 2
    figure.legend(
        lines, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    save(figure, path)
    return path


def _draw_series(axes: Axes, series: DensitySeries, place: int, *, spans: bool) -> None:
    color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
    dash = DASHES[(place + place // len(COLORS)) % len(DASHES)]
    sparse = [(i, d) for i, d in enumerate(series.densities) if d is not None]
    dense = [i for i, d in enumerate(series.densities) if d is None]
    if spans and series.heads:
        edges = [(i, min(heads), max(heads)) for i, heads in enumerate(series.heads) if heads]
        axes.vlines(
            [i for i, _, _ in edges],
            [low for _, low, _ in edges],
            [high for _, _, high in edges],
            color=color,
            alpha=0.35,
            linewidth=4,
            label="least to most of the heads",
        )
    if sparse:
        mean = sum(d for _, d in sparse) / len(sparse)
        axes.plot(
            [i for i, _ in sparse],
            [d for _, d in sparse],
            color=color,
            marker=marker,
            linestyle=dash,
            linewidth=1.0,
            markersize=4.5,
            label=f"{series.name}: mean {say_tenths(mean)} over "
            f"{counted(len(sparse), 'sparse call')}",
        )
    if dense:
        axes.plot(
            dense,
            [1.0] * len(dense),
            color=FAINT if spans else color,
            marker=marker,
            linestyle="none",
            fillstyle="none",
            markersize=5.5,
            label=f"{series.name}: {counted(len(dense), 'dense call')}",
        )
