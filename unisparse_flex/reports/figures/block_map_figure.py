"""Block maps: a panel for each layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...shares import say_share
from .block_maps import LayerBlocks
from .style import DROPPED, FAINT, HIDDEN, KEPT, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAYERS_PER_PAGE = 6
MOST_HEADS = 16
PANEL_INCHES = 0.95
# Beside the panels: names of the layers; title, axis labels and legend.
SIDE_INCHES, HEAD_INCHES = 1.0, 1.5


def draw_block_maps(
    blocks: Sequence[LayerBlocks], path: Path, *, title: str, heads: int = MOST_HEADS
) -> list[Path]:
    """Draws the kept blocks of every sparse call, a row of panels a call, a column a head.

    Args:
        blocks: What `collect_blocks` returned; dense calls are left out.
        path: Of the first page; further ones have a number after the name.
        title: What was read, and by which model.
        heads: Most heads that are drawn, spread evenly over those there are.

    Returns:
        The files written, one for every six calls; none where all calls are dense.
    """
    sparse = [layer for layer in blocks if layer.keep is not None]
    pages = _pages(sparse, LAYERS_PER_PAGE)
    written = []
    for number, page in enumerate(pages, 1):
        name = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        part = f" ({number} of {len(pages)})" if len(pages) > 1 else ""
        _draw_page(page, name, title=title + part, heads=heads)
        written.append(name)
    return written


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` indices, evenly apart, the first and the last among them."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [0]
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _draw_page(page: Sequence[LayerBlocks], path: Path, *, title: str, heads: int) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = max(len(spread(len(layer.head_densities()), heads)) for layer in page)
    width = max(columns * PANEL_INCHES + SIDE_INCHES, 5.5)
    figure = Figure(
        figsize=(width, len(page) * (PANEL_INCHES + 0.18) + HEAD_INCHES), layout="constrained"
    )
    panels = figure.subplots(len(page), columns, squeeze=False)
    colors = ListedColormap([HIDDEN, DROPPED, KEPT])
    for layer, row in zip(page, panels, strict=True):
        _draw_layer(layer, row, colors, heads)
    _label_tokens(panels[-1, 0], page[-1])
    figure.suptitle(title, fontsize=10)
    figure.legend(
        handles=[
            Patch(facecolor=KEPT, edgecolor=FAINT, label="kept"),
            Patch(facecolor=DROPPED, edgecolor=FAINT, label="dropped"),
            Patch(facecolor=HIDDEN, edgecolor=FAINT, label="hidden by the mask"),
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    save(figure, path)


def _draw_layer(layer: LayerBlocks, row: Any, colors: Any, heads: int) -> None:
    assert layer.keep is not None
    assert layer.visible is not None
    densities = layer.head_densities()
    shown = spread(len(densities), heads)
    for axes, head in zip(row, shown, strict=False):
        levels = layer.visible[head].to(torch.uint8) + (layer.keep & layer.visible)[head]
        axes.imshow(
            levels.numpy(), cmap=colors, vmin=0, vmax=2, interpolation="nearest", aspect="auto"
        )
        axes.set_box_aspect(1)
        axes.set_title(f"head {head}: {say_share(densities[head])}", fontsize=6.5, pad=2)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#999999")
        axes.spines[:].set_linewidth(0.5)
    for axes in row[len(shown) :]:
        axes.set_axis_off()
    mean = sum(densities) / len(densities)
    name = "\n".join(wrap_name(layer.layer))
    row[0].set_ylabel(
        f"{name}\n{say_share(mean)}", rotation=0, ha="right", va="center", fontsize=7, labelpad=4
    )


def wrap_name(layer: str, width: int = 14) -> list[str]:
    """A module's name, broken at its dots into lines of about ``width`` characters."""
    lines = [""]
    for part in layer.split("."):
        if lines[-1] and len(lines[-1]) + len(part) + 1 > width:
            lines[-1] += "."
            lines.append(part)
        else:
            lines[-1] += f".{part}" if lines[-1] else part
    return lines


def _label_tokens(axes: Axes, layer: LayerBlocks) -> None:
    """Lengths in tokens, on one panel for all."""
    assert layer.keep is not None
    keys = layer.keep.shape[2]
    axes.set_xticks([-0.5, keys - 0.5], ["0", str(layer.kv_len)], fontsize=6)
    axes.set_xlabel("key token (queries downwards)", fontsize=6.5, labelpad=1)
    axes.tick_params(length=2, pad=1)


def _pages(layers: Sequence[LayerBlocks], size: int) -> list[Sequence[LayerBlocks]]:
    return [layers[start : start + size] for start in range(0, len(layers), size)]
