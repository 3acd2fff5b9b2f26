"""`unisparse-flex demo`, its help and its exit codes."""

from __future__ import annotations

import subprocess
import sys

from unisparse_flex.cli import failures


def test_help_has_every_option_and_examples(run):
    ran = run("demo", "--help")
    assert ran.code == 0
    assert ran.out.startswith("Usage: unisparse-flex demo ")
    assert "unisparse-flex demo --text code" in ran.out
    assert all(name in ran.out for name in ("--tokens", "--top-p", "--json", "--compile-dense"))


def test_exit_codes(run, monkeypatch):
    ran = run("demo", "--tokens", "9000")
    assert ran.code == 2
    assert "--tokens must be in [512, 8192]" in ran.err
    assert run("demo", "-x").code == 2
    monkeypatch.setattr(failures, "find_spec", lambda name: None)
    assert run("demo", "--quiet").code == 1


def test_the_demo_runs_as_a_command_of_the_module():
    command = [sys.executable, "-m", "unisparse_flex", "demo", "--tokens", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "--tokens must be in [512, 8192]" in ran.stderr
