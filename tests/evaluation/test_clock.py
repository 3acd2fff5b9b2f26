import time

import pytest
import torch

from unisparse_flex.clock import in_turn, timed

CPU = torch.device("cpu")


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
