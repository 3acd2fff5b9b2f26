"""The picture of the folders in CONTRIBUTING, from what imports what.

python -m bench layers [--output FILE]

An arrow goes from what imports to what is imported; those that follow from others are left out.
"""

from __future__ import annotations

import argparse
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

from unisparse_flex.reports.figures.style import COLORS, save

ROOT = "unisparse_flex"
LAYERS = {ROOT: "unisparse_flex: what a user touches", f"{ROOT}.passes": "passes: where in a graph"}
LAYERS[f"{ROOT}.block_masks"] = "block_masks: which blocks"
OUTPUT = Path("docs/layers.png")

Imports = dict[str, set[str]]


def layer_of(name: str) -> str:
    """The layer that a folder or module belongs to."""
    return max((layer for layer in LAYERS if f"{name}.".startswith(f"{layer}.")), key=len)


def find_imports() -> Imports:
    """What every folder and single module on a layer's floor imports of the others."""
    graph = grimp.build_graph(ROOT, cache_dir=None)

    def place(module: str) -> str:
        layer = layer_of(module)
        inside = module[len(layer) + 1 :].split(".")[0]
        return f"{layer}.{inside}" if inside else ""

    imports: Imports = {}
    for module in graph.modules:
        here = place(module)
        if here and not module.endswith("__main__"):
            there = {place(name) for name in graph.find_modules_directly_imported_by(module)}
            imports.setdefault(here, set()).update(there - {here, ""})
    return imports


def reduce(imports: Imports) -> Imports:
    """The imports less those that follow from the others."""

    def reached(name: str) -> set[str]:
        return imports[name].union(*(reached(other) for other in imports[name]))

    return {
        name: {n for n in others if not any(n in reached(o) for o in others - {n})}
        for name, others in imports.items()
    }


def heights(imports: Imports) -> dict[str, int]:
    """The longest chain of imports below each, within its layer."""
    found: dict[str, int] = {}
    for name in TopologicalSorter(imports).static_order():
        below = [found[n] for n in imports[name] if layer_of(n) == layer_of(name)]
        found[name] = 1 + max(below, default=-1)
    return found


def draw(imports: Imports, output: Path) -> None:
    """Writes the picture."""
    from matplotlib.figure import Figure

    levels, base, places = heights(imports), 0.0, {}
    figure = Figure(figsize=(10, 8.5), layout="constrained")
    axes = figure.subplots()
    for colour, (layer, title) in zip(COLORS[:3], reversed(LAYERS.items()), strict=True):
        names = [name for name in imports if layer_of(name) == layer]
        rows = 1 + max(levels[name] for name in names)
        axes.axhspan(base - 0.5, base + rows - 0.5, color=colour, alpha=0.12, linewidth=0)
        axes.text(-0.19, base + rows - 0.58, title, va="top", weight="bold", color=colour)
        for row in range(rows):
            here = sorted(name for name in names if levels[name] == row)
            for i, name in enumerate(here):
                places[name] = ((i + 0.5 + 0.25 * (row % 2)) / (len(here) + 0.25), base + row)
        base += rows
    boxes = {}
    for name, (x, y) in places.items():
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "0.4"}
        label = axes.text(x, y, name.rpartition(".")[2], ha="center", va="center", size=9, bbox=box)
        boxes[name] = label.get_bbox_patch()
    for name, others in imports.items():
        for other in others:
            ends = {"patchA": boxes[name], "patchB": boxes[other]}
            arrow = {"arrowstyle": "-|>", "color": "0.45", "lw": 0.8, "zorder": 1, **ends}
            axes.annotate("", places[other], places[name], arrowprops=arrow)
    axes.set(xlim=(-0.2, 1.02), ylim=(-0.6, base - 0.4))
    axes.axis("off")
    save(figure, output)


def main() -> None:
    """Draws what the sources say."""
    parser = argparse.ArgumentParser(
        prog="python -m bench layers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    draw(reduce(find_imports()), parser.parse_args().output)


if __name__ == "__main__":
    main()
