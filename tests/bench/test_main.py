"""``python -m bench`` lists the benchmarks and runs them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench import __main__ as harness
from unisparse_flex.cli.bench import BENCHMARKS


def test_everything_with_a_main_is_listed_with_what_it_says_of_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert harness.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert harness.main([]) == 0
    assert capsys.readouterr().out == printed
    listed = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert set(BENCHMARKS) < set(listed)
    assert not {"record", "timing", "__main__"} & set(listed)
    assert all(len(purpose) > 20 for purpose in listed.values())


def test_a_benchmark_gets_its_arguments() -> None:
    command = [sys.executable, "-m", "bench", "cost_rates", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0
    assert "--plain-selection" in ran.stdout


def test_an_unknown_name_is_said_with_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.main(["speed"]) == 2
    assert "got 'speed'; list them with: python -m bench --list" in capsys.readouterr().err
