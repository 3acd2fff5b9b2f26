"""Progress on standard error: a bar where the parts are counted, once two seconds have passed."""

from __future__ import annotations

import threading
from typing import Self

from ..progress import StepDisplay

BAR_CHARACTERS = 24
TICK_SECONDS = 0.5


class Progress(StepDisplay):
    """`StepDisplay` with a bar, which also shows a step that begins early and takes long.

    Args:
        title: Who is at work.
        total: Parts that `advance` will count; 0 where that is unknown.
        shown: Whether anything is written at all.
    """

    def __init__(self, title: str, *, total: int = 0, shown: bool = True) -> None:
        super().__init__(title, shown=shown)
        self.total, self.done = total, 0
        self._step = ""
        self._lock = threading.Lock()
        self._over = threading.Event()

    def __enter__(self) -> Self:
        super().__enter__()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._ticker.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._ticker.join()
        super().__exit__(*error)

    def show(self, step: str) -> None:
        """Says what comes next."""
        with self._lock:
            self._step = step
            super().show(step)

    def _tick(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            with self._lock:
                if self._step:
                    super().show(self._step)

    def advance(self, step: str) -> None:
        """Says which part comes next and counts it."""
        self.done += 1
        self.show(f"{bar(self.done - 1, self.total)} {step}" if self.total else step)


def bar(done: int, total: int) -> str:
    """A bar of fixed width with the numbers after it."""
    filled = min(BAR_CHARACTERS, round(BAR_CHARACTERS * done / total))
    return f"[{'#' * filled}{'-' * (BAR_CHARACTERS - filled)}] {done}/{total}"
