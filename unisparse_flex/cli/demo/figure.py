"""One picture of the blocks that every layer keeps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...evaluation import MODEL_NAME
from ...shares import say_share
from .options import DemoOptions
from .results import DemoResult, Layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import BoundaryNorm, ListedColormap

COLUMNS = 6
PANEL_INCHES = 1.6
DPI = 200
NEEDLE_COLOR = "#d55e00"  # vermillion of Okabe and Ito
DROPPED_COLOR = "#ebebeb"
# One hue, evenly darker: survives grey print and every kind of colour blindness.
KEPT_COLORS = ("#b5d3ea", "#08264f")


def save_figure(result: DemoResult, options: DemoOptions, path: Path) -> None:
    """Draws a panel per layer: which share of its heads keeps each block.

    Args:
        result: Of the run.
        options: Of the run.
        path: Of the PNG file; its folder is made.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    rows = math.ceil(len(result.layers) / COLUMNS)
    # Beside the panels: title, axis labels and colour bar.
    size = (COLUMNS * PANEL_INCHES, rows * PANEL_INCHES + 1.5)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True)
    colors, norm = _head_colors(result.heads)
    needle_block = result.prompt.needle_span[0] // options.block_size
    for index, axes in enumerate(panels.flat):
        if index < len(result.layers):
            _draw_layer(axes, index, result, colors, norm, needle_block)
        else:
            axes.set_axis_off()
    for axes in panels[-1, 1:]:
        axes.tick_params(labelbottom=False)
    _label_tokens(panels[-1, 0], result.prompt.tokens, options.block_size)
    density, recall = result.optimized.density, result.optimized.recall
    figure.suptitle(
        f"Blocks kept by the {options.selector} selector in every layer of {MODEL_NAME}\n"
        f"{result.prompt.tokens} tokens of {options.text}, blocks of {options.block_size}: "
        f"{say_share(density)} of the causal blocks hold {say_share(recall)} of dense attention",
        fontsize=12,
    )
    bar = figure.colorbar(
        ScalarMappable(norm=norm, cmap=colors),
        ax=panels,
        location="bottom",
        aspect=60,
        shrink=0.7,
        pad=0.01,
        ticks=range(result.heads + 1),
    )
    bar.set_label(
        f"query heads (of {result.heads}) that keep the block; "
        "panel titles: density; triangle: column of the needle"
    )
    bar.ax.tick_params(length=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _head_colors(heads: int) -> tuple[ListedColormap, BoundaryNorm]:
    """A colour for each number of heads, 0 to all of them."""
    from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap

    shades = LinearSegmentedColormap.from_list("kept", KEPT_COLORS, N=heads)
    colors = ListedColormap([DROPPED_COLOR, *(shades(i) for i in range(heads))])
    return colors, BoundaryNorm([level - 0.5 for level in range(heads + 2)], colors.N)


def _draw_layer(
    axes: Axes, index: int, result: DemoResult, colors: Any, norm: Any, needle_block: int
) -> None:
    layer: Layer = result.layers[index]
    blocks = layer.kept.shape[-1]
    counts = (layer.kept * result.heads).round()
    future = torch.ones(blocks, blocks, dtype=torch.bool).triu(1)
    counts = counts.masked_fill(future, torch.nan)  # left blank
    axes.imshow(counts.numpy(), cmap=colors, norm=norm, interpolation="nearest")
    axes.plot(
        needle_block,
        needle_block - 0.07 * blocks,  # above the diagonal, where nothing is drawn
        marker="v",
        color=NEEDLE_COLOR,
        markersize=5,
        clip_on=False,
    )
    axes.set_title(f"layer {index}: {say_share(layer.density)}", fontsize=9, pad=-4)
    axes.set_xlim(-0.5, blocks - 0.5)
    axes.set_ylim(blocks - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(length=0, labelsize=8)


def _label_tokens(axes: Axes, tokens: int, block_size: int) -> None:
    """Tick labels in tokens, on one panel for all."""
    ticks = [0, tokens // 2, tokens]
    axes.set_xticks([tick / block_size - 0.5 for tick in ticks], [str(tick) for tick in ticks])
    axes.set_yticks([tick / block_size - 0.5 for tick in ticks], [str(tick) for tick in ticks])
    axes.set_xlabel("key token", fontsize=9)
    axes.set_ylabel("query token", fontsize=9)
