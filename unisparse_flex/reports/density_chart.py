"""Where the bars of the page's chart of densities stand: plain numbers for an inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..shares import say_tenths
from .explain_report import ReportedCall

WIDTH, HEIGHT = 960, 150
LEFT, BOTTOM = 44, 22
LABELS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One attention call.

    Attributes:
        x: Left edge in pixels.
        y: Upper edge.
        width: In pixels.
        height: In pixels; a dense call reads every block.
        decision: ``"sparse"`` or ``"dense"``.
        title: Shown under the pointer.
        label: Number of the call, where there is room for it.
    """

    x: float
    y: float
    width: float
    height: float
    decision: str
    title: str
    label: str


def compute_bars(calls: Sequence[ReportedCall]) -> list[Bar]:
    """Returns a bar for each call, density upwards from 0 to 1."""
    step = (WIDTH - LEFT) / max(len(calls), 1)
    gap = min(step * 0.25, 4.0)
    every = -(-len(calls) // LABELS)
    bars = []
    for index, call in enumerate(calls):
        record = call.record
        density = 1.0 if record.density is None else record.density
        height = density * (HEIGHT - BOTTOM)
        bars.append(
            Bar(
                x=round(LEFT + index * step + gap / 2, 2),
                y=round(HEIGHT - BOTTOM - height, 2),
                width=round(step - gap, 2),
                height=round(height, 2),
                decision=record.decision,
                title=f"{record.layer}: {record.decision}, {say_tenths(density)} of the blocks",
                label=str(index) if index % every == 0 else "",
            )
        )
    return bars
