"""What the kernels for decoding are told beside tensors."""

from __future__ import annotations

from typing import NamedTuple


class DecodeRule(NamedTuple):
    """Which units are kept, as `pages.DecodeSelector` says, counted in units.

    Attributes:
        top_p: Least share of the estimated attention.
        budget: Most units; below 0 for no limit.
        share: Most units, as a share of the request's.
        fewest: Fewest units; requests of no more keep everything.
        sinks: First units that are always kept.
        last: Last ones.
        whole: Requests of no more units keep everything too.
    """

    top_p: float
    budget: int
    share: float
    fewest: int
    sinks: int
    last: int
    whole: int = 0

    @property
    def read_whole(self) -> int:
        """Most units of a request that keeps everything."""
        return max(self.fewest, self.whole)
