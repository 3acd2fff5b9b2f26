"""The density of several calls, for `explain`, `quality`, `speed` and `calibrate` alike."""

from __future__ import annotations

from collections.abc import Iterable

from ..passes import DenseReason

# Why a call stays dense that could be sparse: by the cost model, by any rule of lengths, or at all.
BY_COST = (DenseReason.SLOWER, DenseReason.KEEPS_MOST)
BY_LENGTH = (*BY_COST, DenseReason.SHORT)
LEFT_DENSE = (*BY_LENGTH, DenseReason.EXCLUDED)


def choosing_densities(calls: Iterable[tuple[float, bool]]) -> list[float]:
    """The densities of the calls that choose their blocks; of all calls where none does.

    Args:
        calls: The density of each, and whether it keeps all of a narrow sliding window.
    """
    known = list(calls)
    return [density for density, is_window in known if not is_window] or [d for d, _ in known]


def mean_density(calls: Iterable[tuple[float, bool]], left_dense: int = 0) -> float | None:
    """Kept over visible blocks, mean over the calls that could be sparse.

    A call that stays dense counts as 1. Calls that keep a whole narrow window are left out, unless
    all do.

    Args:
        calls: See `choosing_densities`.
        left_dense: Calls that stay dense and are none of these.

    Returns:
        In [0, 1]; ``None`` without a call.
    """
    kept = choosing_densities(calls)
    return (sum(kept) + left_dense) / (len(kept) + left_dense) if kept else None
