"""What a pass did to a graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..decision import DenseReason
from ..masks import Unproved

WINDOW_KEPT = "sliding window of few blocks: kept whole, nothing to select"


@dataclass(slots=True)
class RewriteReport:
    """The outcome of `rewrite_sdpa` on one graph.

    Attributes:
        rewritten: Names of the nodes that now run sparse (where their lengths allow it).
        left: Names of the nodes that stay dense, each with its reason.
        flagged: Names of those that do without their mask tensor, which ``is_causal`` says.
        masks: Names of the rewritten nodes whose mask became a formula, each with what it is.
        windows: Names of the rewritten nodes whose sliding window is kept whole, with no scores.
        unproved: Names of the rewritten nodes whose mask stays a tensor, each with the reason.
        ungrouped: Names of the rewritten nodes whose keys and values are no longer repeated for
            their query heads, each with the bytes of the copies that nothing else needs.
    """

    rewritten: list[str] = field(default_factory=list)
    left: dict[str, DenseReason] = field(default_factory=dict)
    flagged: list[str] = field(default_factory=list)
    masks: dict[str, str] = field(default_factory=dict)
    windows: list[str] = field(default_factory=list)
    unproved: dict[str, Unproved] = field(default_factory=dict)
    ungrouped: dict[str, int] = field(default_factory=dict)

    @property
    def skipped(self) -> dict[DenseReason, int]:
        """How many nodes stay dense for each reason."""
        return dict(Counter(self.left.values()))

    def __str__(self) -> str:
        lines = [f"{len(self.rewritten)} attention calls rewritten, {len(self.left)} left dense"]
        lines += [f"  {count} x {reason}" for reason, count in self.skipped.items()]
        if self.flagged:
            lines.append(f"  {len(self.flagged)} x dense with is_causal in place of a mask tensor")
        proved, unproved = Counter(self.masks.values()), Counter(self.unproved.values())
        lines += [f"  {count} x mask proved: {kind}" for kind, count in proved.items()]
        if self.windows:
            lines.append(f"  {len(self.windows)} x {WINDOW_KEPT}")
        lines += [f"  {count} x mask kept as a tensor: {why}" for why, count in unproved.items()]
        if self.ungrouped:
            saved = sum(self.ungrouped.values()) / 2**20
            lines.append(f"  {len(self.ungrouped)} x repeated key heads removed: {saved:.1f} MiB")
        return "\n".join(lines)
