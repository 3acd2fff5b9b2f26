"""What becomes of the eager attention calls of a forward, counted for whoever asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..decision import DenseReason

# Why calls stay dense; `None` counts those that run sparse, and code of which nothing is seen.
Outcomes = Counter[DenseReason | None]

_outcomes: ContextVar[Outcomes | None] = ContextVar("unisparse_outcomes", default=None)


@contextmanager
def count_outcomes() -> Iterator[Outcomes]:
    """Counts what becomes of the attention calls that run inside."""
    outcomes: Outcomes = Counter()
    token = _outcomes.set(outcomes)
    try:
        yield outcomes
    finally:
        _outcomes.reset(token)


def count_outcome(reason: DenseReason | None) -> None:
    """Says what became of a call; does nothing where nobody counts."""
    outcomes = _outcomes.get()
    if outcomes is not None:
        outcomes[reason] += 1


def are_counted() -> bool:
    """Whether somebody counts outcomes here."""
    return _outcomes.get() is not None
