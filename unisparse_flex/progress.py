"""Progress on standard error: what a long call is doing, with a bar where its parts are counted."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, Self, TextIO

QUIET_SECONDS = 2.0
# Between two lines where they cannot overwrite one another.
LINE_SECONDS = 15.0
TICK_SECONDS = 0.5
BAR_CHARACTERS = 12
CUT = "..."
# To the start of the line, and what stands after it away.
ERASE = "\r\x1b[K"


class Progress:
    """One line that says what is being done and for how long, once that takes two seconds.

    Beside the seconds of all steps stand those of the step itself, ``2 s, all 14 s``.

    A terminal has the line overwritten, also while a step goes on; what others write to standard
    error takes its place. Elsewhere, as in a file or a pipe, there is a new line every 15 seconds.
    A line fits the terminal's width, or 80 columns: where one is too long the bar goes first, for
    good, then the end of the step, whose name therefore stands at its beginning. All goes where
    standard error went when the block began.

    Args:
        title: Who is at work, before every step; nobody where it is empty.
        total: Parts that `advance` will count; 0 where that is unknown.
        shown: Whether anything is written at all.
    """

    def __init__(self, title: str = "", *, total: int = 0, shown: bool = True) -> None:
        self.title, self.total, self.done, self.shown = title, total, 0, shown
        self._step = ""
        # Parts of the step, over and in all; none in all where they are not counted.
        self._parts = 0, 0
        # Until a line has no room for it: what comes and goes is no help.
        self._has_bar = True
        self._unfinished = False
        self._yielded = False
        # What is collected while it is held may write a warning.
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        self._start = self._next_line = self._step_start = time.monotonic()
        self._stream: TextIO = sys.stderr
        self._others = redirect_stderr(_Others(self, self._stream))
        if self.shown:
            self._others.__enter__()
            self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.shown:
            return
        self._over.set()
        self._ticker.join()
        self._others.__exit__(None, None, None)
        if self._unfinished:
            self._stream.write("\n")

    def show(self, step: str, *, at_once: bool = False) -> None:
        """Says what comes next.

        Args:
            step: What it is.
            at_once: Without waiting for two seconds.
        """
        self._begin(step, (0, 0), at_once=at_once)

    def _begin(self, step: str, parts: tuple[int, int], *, at_once: bool = False) -> None:
        with self._lock:
            now = self._step_start = time.monotonic()
            self._step, self._parts = step, parts
            self._show(now, at_once=at_once)

    def _go_on(self, step: str, parts: tuple[int, int]) -> None:
        """Says what is done now in the step that began before."""
        with self._lock:
            self._step, self._parts = step, parts
            self._show(time.monotonic())

    def advance(self, step: str) -> None:
        """Says which part comes next and counts it."""
        self.done += 1
        self._begin(step, (self.done - 1, self.total))

    @contextmanager
    def step(self, name: str, total: int = 0) -> Iterator[Callable[[], None]]:
        """Shows a step with seconds of its own; a line with them stays when it is over.

        Args:
            name: What is done in it.
            total: Its parts; each call of what is yielded counts one that is over.
        """
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self._go_on(name, (done, total))

        with self._lock:
            self._start = self._step_start = time.monotonic()
            self._next_line = self._start + LINE_SECONDS
        self._go_on(name, (done, total))
        yield advance
        with self._lock:
            self._step, self._parts = "", (0, 0)
            if self.shown:
                self._write(name, time.monotonic(), end="\n")

    def _tick(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            with self._lock:
                if self._step:
                    self._show(time.monotonic())

    def _show(self, now: float, *, at_once: bool = False) -> None:
        if not self.shown or self._yielded or (now - self._start < QUIET_SECONDS and not at_once):
            return
        if self._stream.isatty():
            self._write(self._step, now, end="")
        elif now >= self._next_line:
            self._write(self._step, now, end="\n")

    def _write(self, step: str, now: float, *, end: str) -> None:
        title = f"{self.title}: " if self.title else ""
        own, total = (f"{now - start:.0f} s" for start in (self._step_start, self._start))
        seconds = f", {total}" if own == total else f", {own}, all {total}"
        # A line that wraps is not overwritten; some terminals wrap after the last column.
        room = terminal_columns(self._stream) - 1 - len(seconds)
        done, parts = self._parts
        what = f"{title}{bar(done, parts)} {step}" if parts else f"{title}{step}"
        if parts and (not self._has_bar or len(what) > room):
            self._has_bar = False
            what = f"{title}{done}/{parts} {step}"
        erase = ERASE if self._stream.isatty() else ""
        self._stream.write(f"{erase}{cut(what, room)}{seconds}{end}")
        self._stream.flush()
        self._next_line, self._unfinished = now + LINE_SECONDS, not end

    def _let_write(self, text: str) -> int:
        """What others write to standard error, in place of the line of now."""
        with self._lock:
            if self._unfinished and self._stream.isatty():
                self._stream.write(ERASE)
            self._unfinished = False
            # Until their line ends.
            self._yielded = not text.endswith("\n")
            return self._stream.write(text)


class _Others:
    """Standard error for all but the `Progress` that shows its line there."""

    def __init__(self, progress: Progress, stream: TextIO) -> None:
        self._progress, self._stream = progress, stream

    def write(self, text: str) -> int:
        return self._progress._let_write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def terminal_columns(stream: TextIO | None = None) -> int:
    """Columns of the terminal behind a stream, by default standard error; 80 if it does not say."""
    try:
        return os.get_terminal_size((stream or sys.stderr).fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def cut(text: str, columns: int) -> str:
    """The text, its end left out where it is longer than that."""
    return text if len(text) <= columns else text[: max(0, columns - len(CUT))] + CUT


def bar(done: int, total: int) -> str:
    """A bar of fixed width with the numbers after it."""
    filled = min(BAR_CHARACTERS, round(BAR_CHARACTERS * done / total))
    return f"[{'#' * filled}{'-' * (BAR_CHARACTERS - filled)}] {done}/{total}"
