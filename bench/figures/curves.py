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
