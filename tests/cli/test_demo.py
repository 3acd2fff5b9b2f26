"""`unisparse-flex demo` is the demo with its own arguments."""

from __future__ import annotations

import pytest

from unisparse_flex.demo import cli as demo_cli


def test_help_is_the_demo_s_own_under_the_command_s_name(run):
    ran = run("demo", "--help")
    assert ran.code == 0
    assert ran.out.startswith("usage: unisparse-flex demo ")
    assert "unisparse-flex demo --text code" in ran.out


def test_arguments_and_exit_codes_pass_through(run, monkeypatch):
    ran = run("demo", "--tokens", "9000")
    assert ran.code == 2
    assert "tokens must be in [512, 8192]" in ran.err
    monkeypatch.setattr(demo_cli, "find_spec", lambda name: None)
    assert run("demo", "--quiet").code == 1


@pytest.mark.parametrize("code", [0, 1])
def test_the_demo_gets_what_was_typed(run, monkeypatch, code):
    seen = []

    def main(arguments, *, program):
        seen.append((list(arguments), program))
        return code

    monkeypatch.setattr(demo_cli, "main", main)
    assert run("demo", "--text", "code", "-x", "--json").code == code
    assert seen == [(["--text", "code", "-x", "--json"], "unisparse-flex demo")]
