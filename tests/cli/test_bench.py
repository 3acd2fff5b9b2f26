"""`unisparse-flex bench` runs what a checkout has, and says so where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import find_benchmarks
from unisparse_flex.cli import bench

ROOT = Path(__file__).parents[2]


def test_every_benchmark_is_a_module_with_a_main():
    entries = find_benchmarks()
    assert [entries[name].module for name in bench.BENCHMARKS] == [
        f"bench.{name}" for name in bench.BENCHMARKS
    ]


def test_list_names_them_all(run):
    ran = run("bench")
    assert ran.code == 0
    assert all(name in ran.out for name in bench.BENCHMARKS)
    assert json.loads(run("bench", "--json").out)["checkout"] == str(ROOT)


def test_a_benchmark_gets_its_own_arguments_and_gives_its_exit_code(run, monkeypatch):
    ran_commands = []

    def record(command, **options):
        ran_commands.append((command, options))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", record)
    assert run("bench", "attention", "--device", "cpu", "--json").code == 3
    ((command, options),) = ran_commands
    assert command == [sys.executable, "-m", "bench.attention", "--device", "cpu", "--json"]
    assert options["cwd"] == ROOT


def test_an_installed_package_says_where_they_are(run, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    ran = run("bench", "attention")
    assert ran.code == 1
    assert "python -m bench.NAME" in ran.err
    assert json.loads(run("bench", "--json").out)["checkout"] is None
    assert bench.WAY in run("bench").out


@pytest.mark.parametrize("name", ["nonsense", "record"])
def test_other_names_are_wrong_arguments(run, name):
    assert run("bench", name).code == 2
