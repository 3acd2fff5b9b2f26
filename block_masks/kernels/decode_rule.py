"""What the kernels for decoding are told beside tensors."""

from __future__ import annotations

from typing import NamedTuple


class DecodeRule(NamedTuple):
    """Which units are kept, as `pages.DecodeSelector` says, counted in units.

    Attributes:
        top_p: Least share of the estimated attention.
        budget: Most units; below 0 for no limit.
        share: Most units, as a share of the request's.
        fewest: Fewest units.
        sinks: First units that are always kept.
        last: Last ones.
    """

    top_p: float
    budget: int
    share: float
    fewest: int
    sinks: int
    last: int
