"""Progress on standard error: a bar where the parts are counted, once two seconds have passed."""

from __future__ import annotations

from ..step_display import StepDisplay

BAR_CHARACTERS = 24


class Progress(StepDisplay):
    """`StepDisplay` with a bar.

    Args:
        title: Who is at work.
        total: Parts that `advance` will count; 0 where that is unknown.
        shown: Whether anything is written at all.
    """

    def __init__(self, title: str, *, total: int = 0, shown: bool = True) -> None:
        super().__init__(title, shown=shown)
        self.total, self.done = total, 0

    def advance(self, step: str) -> None:
        """Says which part comes next and counts it."""
        self.done += 1
        self.show(f"{bar(self.done - 1, self.total)} {step}" if self.total else step)


def bar(done: int, total: int) -> str:
    """A bar of fixed width with the numbers behind it."""
    filled = min(BAR_CHARACTERS, round(BAR_CHARACTERS * done / total))
    return f"[{'#' * filled}{'-' * (BAR_CHARACTERS - filled)}] {done}/{total}"
