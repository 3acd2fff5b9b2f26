"""Where the points of KL by density stand: plain numbers for an inline SVG."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..shares import say_tenths

WIDTH, HEIGHT = 960, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 30, 40
# What is drawn of a KL of 0 on a logarithmic axis, and of those below.
LEAST_KL = 1e-6
LABEL_GAP, CHARACTER_WIDTH = 10, 7.5
LABEL_HEIGHT = 14
# The lines, from the bottom of the chart, on which the axis of densities has its numbers and name.
TICK_BELOW, NAME_BELOW = 19, 35
AXIS_NAME = "blocks kept of those visible"
# A label is right of its point, above the falling line, or left and below; elsewhere where another
# label lies there.
ABOVE, BELOW = -7, 18
PLACES = (
    ("start", ABOVE),
    ("end", BELOW),
    ("start", BELOW),
    ("end", ABOVE),
    ("start", ABOVE - LABEL_HEIGHT),
    ("end", BELOW + LABEL_HEIGHT),
    ("start", BELOW + LABEL_HEIGHT),
    ("end", ABOVE - LABEL_HEIGHT),
    ("start", ABOVE - 2 * LABEL_HEIGHT),
    ("end", ABOVE - 2 * LABEL_HEIGHT),
)

# Left, right, top and bottom.
Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One setting, mean over texts.

    Attributes:
        x: In pixels from the left.
        y: In pixels from above.
        label: What the setting is called.
        label_x: Where its label begins, or ends.
        label_y: The line that its label stands on.
        anchor: ``"start"`` or ``"end"``.
        kind: ``"dial"`` for the library's settings, ``"other"`` for what they are compared with.
        title: Shown under the pointer.
    """

    x: float
    y: float
    label: str
    label_x: float
    label_y: float
    anchor: str
    kind: str
    title: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """A line of the grid.

    Attributes:
        at: In pixels, from the left or from above.
        label: Its number.
    """

    at: float
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The chart.

    Attributes:
        points: All settings.
        line: The library's, by density, as the points of a polyline.
        densities: Ticks from left to right.
        divergences: Ticks from above, powers of ten.
        width: In pixels.
        height: In pixels.
        left: Where the densities begin.
        right: Where they end.
        bottom: Where the least divergence lies.
        tick_line: What the numbers of the densities stand on.
        name_line: What the name of their axis stands on.
        name: That name.
    """

    points: Sequence[Point]
    line: str
    densities: Sequence[Tick]
    divergences: Sequence[Tick]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM
    tick_line: int = HEIGHT - BOTTOM + TICK_BELOW
    name_line: int = HEIGHT - BOTTOM + NAME_BELOW
    name: str = AXIS_NAME


def compute_curve(means: Sequence[Mapping[str, Any]], *, dial: Collection[str]) -> Curve:
    """Places settings by density, from 0 to 1, and KL, on a logarithmic axis.

    Args:
        means: Each with ``setting``, ``density`` and ``kl``.
        dial: Which of the settings are the library's, joined by a line.
    """
    exponents = [math.log10(max(mean["kl"], LEAST_KL)) for mean in means] or [0.0]
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))
    high = max(high, low + 1)
    is_cut = any(mean["kl"] < LEAST_KL for mean in means)

    def x_of(density: float) -> float:
        return round(LEFT + density * (WIDTH - LEFT - RIGHT), 1)

    def y_of(exponent: float) -> float:
        return round(TOP + (high - exponent) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    densities = [Tick(at=x_of(n / 5), label=f"{20 * n}%") for n in range(6)]
    points: list[Point] = []
    taken = _boxes_below(densities)
    for mean, exponent in zip(means, exponents, strict=False):
        x, y, name = x_of(mean["density"]), y_of(exponent), mean["setting"]
        anchor, shift, box = _place(x, y, CHARACTER_WIDTH * len(name), taken)
        taken.append(box)
        points.append(
            Point(
                x=x,
                y=y,
                label=name,
                label_x=x + LABEL_GAP if anchor == "start" else x - LABEL_GAP,
                label_y=y + shift,
                anchor=anchor,
                kind="dial" if name in dial else "other",
                title=f"{name}: density {say_tenths(mean['density'])}, KL {mean['kl']:.4f}",
            )
        )
    joined = sorted((point for point in points if point.kind == "dial"), key=lambda p: p.x)
    return Curve(
        points=points,
        line=" ".join(f"{point.x},{point.y}" for point in joined),
        densities=densities,
        divergences=[
            # What is drawn there is as good as 0, and may be it.
            Tick(at=y_of(n), label="0" if n == low and is_cut else f"{10.0**n:g}")
            for n in range(low, high + 1)
        ],
    )


def _boxes_below(ticks: Sequence[Tick]) -> list[Box]:
    """Where the numbers and the name of the axis stand, below the chart."""
    bottom = HEIGHT - BOTTOM
    widths = [CHARACTER_WIDTH * len(tick.label) / 2 for tick in ticks]
    line = bottom + TICK_BELOW
    numbers = [
        (tick.at - half, tick.at + half, line - LABEL_HEIGHT, line)
        for tick, half in zip(ticks, widths, strict=True)
    ]
    right, line = WIDTH - RIGHT, bottom + NAME_BELOW
    return [
        *numbers,
        (right - CHARACTER_WIDTH * len(AXIS_NAME), right, line - LABEL_HEIGHT, line),
    ]


def _place(x: float, y: float, width: float, taken: Sequence[Box]) -> tuple[str, int, Box]:
    """The first of `PLACES` for a label that is inside and free: its anchor, shift and box."""
    boxes = []
    for anchor, shift in PLACES:
        left = x + LABEL_GAP if anchor == "start" else x - LABEL_GAP - width
        boxes.append((anchor, shift, (left, left + width, y + shift - LABEL_HEIGHT, y + shift)))
    inside = [place for place in boxes if place[2][0] >= LEFT and place[2][1] <= WIDTH] or boxes
    for place in inside:
        if not any(_overlap(place[2], other) for other in taken):
            return place
    return inside[0]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]
