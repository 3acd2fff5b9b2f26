"""What lies between the points of a curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """Of points (x, y) by rising x, y at an ``x``: its logarithm is straight between two.

    ``None`` outside of them, and beside a y without a logarithm.
    """
    for (low, first), (high, last) in pairwise(points):
        if low <= x <= high and min(first, last) > 0:
            part = 0.0 if low == high else (x - low) / (high - low)
            return math.exp((1 - part) * math.log(first) + part * math.log(last))
    return None


def place_of(points: Sequence[tuple[float, float]], y: float) -> float | None:
    """Of points (x, y) by rising x, the x at which a falling curve reaches a ``y``.

    The logarithm of y is straight between two points; ``None`` where the curve does not reach it.
    """
    for (low, first), (high, last) in pairwise(points):
        if min(first, last) > 0 and last <= y <= first:
            span = math.log(first) - math.log(last)
            part = 0.0 if span == 0 else (math.log(first) - math.log(y)) / span
            return low + part * (high - low)
    return None
