"""What a pass did to a graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .decision import Reason


@dataclass(slots=True)
class RewriteReport:
    """The outcome of `rewrite_sdpa` on one graph.

    Attributes:
        rewritten: Names of the nodes that now run sparse (where their lengths allow it).
        left: Names of the nodes that stay dense, each with its reason.
    """

    rewritten: list[str] = field(default_factory=list)
    left: dict[str, Reason] = field(default_factory=dict)

    @property
    def skipped(self) -> dict[Reason, int]:
        """How many nodes stay dense for each reason."""
        return dict(Counter(self.left.values()))

    def __str__(self) -> str:
        lines = [f"{len(self.rewritten)} attention calls rewritten, {len(self.left)} left dense"]
        lines += [f"  {count} x {reason}" for reason, count in self.skipped.items()]
        return "\n".join(lines)
