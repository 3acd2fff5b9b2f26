"""What long calls show on standard error, on a terminal and in a pipe."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr

import pytest

from unisparse_flex import progress as progress_module
from unisparse_flex.progress import Progress, bar, terminal_columns

Clock = Callable[[Sequence[float]], None]
OVERWRITE = "\r\x1b[K"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Sets what the display reads from the clock; nothing but its calls reads it."""

    def set_readings(readings: Sequence[float]) -> None:
        left = iter(readings)
        monkeypatch.setattr(progress_module, "TICK_SECONDS", 600.0)
        monkeypatch.setattr("unisparse_flex.progress.time.monotonic", lambda: next(left))

    return set_readings


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes standard error a terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def test_bar_fills_with_the_parts_that_are_done():
    assert bar(0, 4) == f"[{'-' * 12}] 0/4"
    assert bar(1, 4) == f"[{'#' * 3}{'-' * 9}] 1/4"
    assert bar(9, 4) == f"[{'#' * 12}] 9/4"


def test_a_pipe_gets_a_line_every_fifteen_seconds_after_two(capsys, clock):
    clock([0.0, 1.9, 2.5, 3.0, 60.0])
    with Progress("calibrate") as progress:
        for step in ("one", "two", "three", "four"):
            progress.show(step)
    assert capsys.readouterr().err == (
        "calibrate: two, 0 s, all 2 s\ncalibrate: four, 0 s, all 60 s\n"
    )


def test_a_terminal_has_one_line_that_is_overwritten(capsys, clock, monkeypatch):
    make_terminal(monkeypatch)
    clock([0.0, 1.9, 2.6, 3.0])
    with Progress("calibrate") as progress:
        for step in ("one", "two", "three"):
            progress.show(step)
    lines = ("calibrate: two, 0 s, all 3 s", "calibrate: three, 0 s, all 3 s")
    assert capsys.readouterr().err == "".join(OVERWRITE + line for line in lines) + "\n"


@pytest.mark.parametrize("columns", [20, 40, 60])
def test_a_line_is_shorter_than_the_terminal_is_wide(capsys, clock, monkeypatch, columns):
    make_terminal(monkeypatch)
    monkeypatch.setattr(progress_module, "terminal_columns", lambda stream: columns)
    clock([0.0, 4.0, 5.0])
    with Progress("explain", total=30) as progress:
        progress.advance("model.decoder.layers.11.self_attention.inner")
        progress.show("end")
    first, second = capsys.readouterr().err.removeprefix(OVERWRITE).split(OVERWRITE)
    assert len(first) == columns - 1
    assert first.endswith("..., 0 s, all 4 s")
    assert second == ("ex..." if columns == 20 else "explain: end") + ", 0 s, all 5 s\n"


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "name", ["UniSparse(top_p=0.95, threshold=0.004)", "model.language_model.layers.12.self_attn"]
)
def test_a_line_of_80_columns_names_the_setting(capsys, clock, monkeypatch, terminal, name):
    if terminal:
        make_terminal(monkeypatch)
    clock([0.0, 700.0, 1000.0, 1600.0])
    with Progress("quality", total=12) as progress:
        progress.advance(f"{name}, 16384 tokens of /somewhere/with/a/long/name/of/a/text.txt")
        progress.advance(name)
        progress.show("end")
    lines = capsys.readouterr().err.removeprefix(OVERWRITE).replace(OVERWRITE, "\n").splitlines()
    assert all(len(line) < 80 for line in lines)
    assert lines[0].startswith(f"quality: 0/12 {name}")
    assert lines[0].endswith("..., 0 s, all 700 s")
    assert lines[1] == f"quality: 1/12 {name}, 0 s, all 1000 s"


def test_the_width_of_no_terminal_is_80(capsys):
    assert terminal_columns() == 80


def test_a_long_step_is_shown_while_it_runs(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "QUIET_SECONDS", 0.1)
    monkeypatch.setattr(progress_module, "TICK_SECONDS", 0.01)
    shown = ""
    with Progress("doctor") as progress:
        progress.show("compile")
        assert capsys.readouterr().err == ""
        for _ in range(500):
            shown += capsys.readouterr().err
            if shown:
                break
            time.sleep(0.01)
    assert shown == "doctor: compile, 0 s\n"
    assert not progress._ticker.is_alive()


def test_a_step_that_must_not_wait_is_shown_at_once(capsys, clock):
    clock([0.0, 0.1])
    with Progress("explain") as progress:
        progress.show("load smollm2", at_once=True)
    assert capsys.readouterr().err == "explain: load smollm2, 0 s\n"


def test_parts_are_counted_in_a_bar(capsys, clock):
    clock([0.0, 0.5, 3.0])
    with Progress("explain", total=3) as progress:
        progress.advance("early")
        progress.advance("late")
    assert capsys.readouterr().err == f"explain: [{'#' * 4}{'-' * 8}] 1/3 late, 0 s, all 3 s\n"


def test_a_bar_that_had_no_room_once_does_not_come_back(capsys, clock):
    clock([0.0, 15.0, 30.0, 45.0])
    with Progress("quality", total=3) as progress:
        for step in ("short", "long " * 14, "short"):
            progress.advance(step)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith(f"quality: [{'-' * 12}] 0/3 short")
    assert second.startswith("quality: 1/3 long ")
    assert third.startswith("quality: 2/3 short")


def test_a_pipe_keeps_a_line_for_every_step_that_is_over(capsys, clock):
    clock([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 9.0, 17.0, 18.0])
    with Progress() as progress:
        with progress.step("load"):
            pass
        with progress.step("read", 2) as advance:
            advance()
            advance()
    running = f"[{'#' * 12}] 2/2 read, 16 s\n"
    assert capsys.readouterr().err == f"load, 1 s\n{running}read, 17 s\n"


def test_on_a_terminal_the_line_of_a_step_that_is_over_stays(capsys, clock, monkeypatch):
    make_terminal(monkeypatch)
    clock([0.0, 0.0, 0.0, 5.0, 6.0])
    with Progress() as progress, progress.step("read", 2) as advance:
        advance()
    running = f"[{'#' * 6}{'-' * 6}] 1/2 read, 5 s"
    assert capsys.readouterr().err == f"{OVERWRITE}{running}{OVERWRITE}read, 6 s\n"


def test_an_error_starts_on_a_line_of_its_own(capsys, clock, monkeypatch):
    make_terminal(monkeypatch)
    clock([0.0, 0.0, 5.0])
    with pytest.raises(ValueError, match="no"), Progress() as progress, progress.step("load"):
        raise ValueError("no")
    assert capsys.readouterr().err == f"{OVERWRITE}load, 5 s\n"


def test_progress_that_is_not_wanted_is_not_shown(capsys):
    with Progress("doctor", shown=False) as progress:
        progress._start -= 3.0
        progress.show("compile")
        progress.advance("one")
        with progress.step("two", 1) as advance:
            advance()
    assert capsys.readouterr().err == ""
    assert progress._ticker.ident is None


def test_a_step_is_shown_where_standard_error_is_redirected_meanwhile(capsys, clock):
    clock([0.0, 3.0, 20.0])
    with Progress("speed") as progress, redirect_stderr(io.StringIO()) as kept:
        progress.show("load")
        print("of a library", file=sys.stderr)
        progress.show("read")
    assert capsys.readouterr().err == "speed: load, 0 s, all 3 s\nspeed: read, 0 s, all 20 s\n"
    assert kept.getvalue() == "of a library\n"


def test_messages_of_others_take_the_place_of_the_line_in_a_terminal(capsys, clock, monkeypatch):
    make_terminal(monkeypatch)
    stream = sys.stderr
    clock([0.0, 3.0, 4.0, 5.0])
    with Progress("quality") as progress:
        progress.show("one")
        sys.stderr.write("sparse attention")
        progress.show("two")
        print(" runs uncompiled", file=sys.stderr)
        progress.show("three")
    assert sys.stderr is stream
    assert capsys.readouterr().err == (
        f"{OVERWRITE}quality: one, 0 s, all 3 s{OVERWRITE}sparse attention runs uncompiled\n"
        f"{OVERWRITE}quality: three, 0 s, all 5 s\n"
    )


def test_messages_of_others_pass_through_a_pipe_as_they_are(capsys, clock):
    clock([0.0, 3.0])
    with Progress("quality") as progress:
        progress.show("one")
        print("sparse attention runs uncompiled", file=sys.stderr)
    shown = "quality: one, 0 s, all 3 s\nsparse attention runs uncompiled\n"
    assert capsys.readouterr().err == shown


def test_what_is_not_shown_leaves_standard_error_alone():
    stream = sys.stderr
    with Progress("quality", shown=False):
        assert sys.stderr is stream
