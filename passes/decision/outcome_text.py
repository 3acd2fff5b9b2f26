"""Why calls stay dense, counted, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def say_reasons(reasons: Mapping[Any, int]) -> str:
    """What follows "all calls stay dense": every reason, that of the most calls first.

    Args:
        reasons: How many calls stay dense for each, such as a `Counter` of `DenseReason`.
    """
    (first, count), *others = sorted(reasons.items(), key=lambda item: -item[1])
    if not others:
        return f": {first or 'no reason is recorded'}"
    rest = (f"; {number}: {reason or 'no reason is recorded'}" for reason, number in others)
    return f"; {count} of them: {first or 'no reason is recorded'}{''.join(rest)}"
