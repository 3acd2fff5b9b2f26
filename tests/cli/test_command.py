"""The command as a whole: help, exit codes, and what it needs to be installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from unisparse_flex import __version__, cli
from unisparse_flex.cli import app

COMMANDS = ("demo", "explain", "calibrate", "plot", "bench", "doctor")
ROOT = Path(__file__).parents[2]


def test_help_names_every_command_and_exit_code(run):
    ran = run("--help")
    assert ran.code == 0
    assert all(f"\n  {name} " in ran.out for name in COMMANDS)
    assert all(f"\n    {code:<3}  " in ran.out for code in (0, 1, 2, 130))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_has_an_example_and_json(run, name):
    ran = run(name, "--help")
    assert ran.code == 0
    assert f"  unisparse-flex {name} " in ran.out
    assert "xample" in ran.out
    assert "--json" in ran.out


def test_version_is_that_of_the_package(run):
    assert run("--version").out == f"unisparse-flex, version {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["explain"], ["explain", "x", "--tokens", "0"], ["doctor", "x"]]
)
def test_wrong_arguments_exit_with_2(run, arguments):
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert "Error" in ran.err


def test_an_interrupt_exits_with_130(run, monkeypatch):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(app.app, "main", interrupt)
    ran = run("doctor")
    assert (ran.code, ran.err) == (130, "interrupted\n")


@pytest.mark.parametrize("missing", ["click", "jinja2"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(run, monkeypatch, missing):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == missing else sys)
    ran = run("doctor")
    assert ran.code == 1
    assert missing in ran.err
    assert "pip install 'unisparse-flex[cli]'" in ran.err


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "unisparse_flex", "bench", "--json"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert set(json.loads(ran.stdout)) == {"schema", "benchmarks", "checkout"}
