import time

import pytest
import torch

from unisparse_flex.clock import LEAST_SECONDS, LEAST_SHARE, CpuWatch, in_turn, timed

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_timed_function_gives_its_result_and_its_seconds():
    def function():
        time.sleep(0.02)
        return "done"

    result, seconds = timed(function, CPU)
    assert result == "done"
    assert 0.02 <= seconds < 5


def test_what_a_timed_function_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        timed(lambda: 1 / 0, CPU)


def test_clocks_take_turns():
    order = []

    def clock(name, seconds):
        def once():
            order.append(name)
            return seconds.pop(0)

        return once

    found = in_turn([clock("a", [9.0, 1.0, 2.0]), clock("b", [5.0, 3.0, 4.0])], repeats=3)
    assert found == [[9.0, 1.0, 2.0], [5.0, 3.0, 4.0]]
    assert order == ["a", "b"] * 3


@pytest.mark.parametrize(
    ("wall", "own", "said"),
    [
        (10.0, 9.95, None),
        (10.0, 10.0 * LEAST_SHARE, None),
        (10.0, 6.4, "64%"),
        (LEAST_SECONDS, 0.0, "0%"),
        # Too short for clocks that tick slowly.
        (0.9 * LEAST_SECONDS, 0.0, None),
        (0.0, 0.0, None),
    ],
)
def test_a_machine_is_busy_where_the_thread_that_computes_lacks_a_core(wall, own, said):
    watch = CpuWatch(wall_seconds=wall, own_seconds=own)
    expected = None
    if said is not None:
        expected = (
            "Other work took part of this machine while it was timed: the model had a core "
            f"{said} of the time, and times scatter; run again when it is idle."
        )
    assert watch.say_busy(CPU) == expected
    # Its host says nothing of a GPU.
    assert watch.say_busy(GPU) is None


def test_what_is_watched_adds_up_and_what_is_outside_does_not(monkeypatch):
    ticks = {"wall": 0.0, "own": 0.0}

    def pass_by(wall, own):
        ticks["wall"] += wall
        ticks["own"] += own

    monkeypatch.setattr(time, "perf_counter", lambda: ticks["wall"])
    monkeypatch.setattr(time, "thread_time", lambda: ticks["own"])
    watch = CpuWatch()
    for wall, own in ((2.0, 1.0), (3.0, 2.5)):
        with watch.watching():
            pass_by(wall, own)
        pass_by(100.0, 100.0)

    def fail():
        pass_by(1.0, 0.5)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), watch.watching():
        fail()
    assert (watch.wall_seconds, watch.own_seconds) == (6.0, 4.0)


def test_a_thread_that_waits_has_no_core():
    watch = CpuWatch()
    with watch.watching():
        time.sleep(LEAST_SECONDS)
    assert watch.own_seconds < 0.5 * watch.wall_seconds
    assert watch.say_busy(CPU) is not None
