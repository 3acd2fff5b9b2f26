"""One line on stderr that says what a long call is doing."""

from __future__ import annotations

import sys
import time
from typing import Self

QUIET_SECONDS = 2.0
# Between two lines where they cannot overwrite one another.
LINE_SECONDS = 15.0


class StepDisplay:
    """Shows steps once they have taken two seconds together.

    Args:
        title: Who is at work.
        shown: Whether anything is written at all.
    """

    def __init__(self, title: str, *, shown: bool = True) -> None:
        self.title, self.shown = title, shown

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        self._last: float | None = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._last is not None and sys.stderr.isatty():
            sys.stderr.write("\n")

    def show(self, step: str) -> None:
        """Says what comes next."""
        now = time.monotonic()
        if not self.shown or now - self._start < QUIET_SECONDS:
            return
        text = f"{self.title}: {step}, {now - self._start:.0f} s"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text}")
        elif self._last is None or now - self._last >= LINE_SECONDS:
            sys.stderr.write(f"{text}\n")
        else:
            return
        sys.stderr.flush()
        self._last = now
