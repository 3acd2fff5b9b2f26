"""Commands that output names are whole, keep the run's options, and do what is said of them."""

from __future__ import annotations

import json
import re
import shlex

import click
import pytest
import torch

from unisparse_flex import UniSparse, calibrate
from unisparse_flex.cli.app import app
from unisparse_flex.command_line import PROGRAM, SHARED_OPTIONS, CommandLine
from unisparse_flex.progress import Progress
from unisparse_flex.reports import advice

from .conftest import CONTEXT, SELECTOR

LONG = "The quick brown fox jumps over the lazy dog.\n"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "my text.txt"
    path.write_text(LONG * 40, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def calibration(model_folder, tmp_path_factory):
    """The file of a calibration of the model in the folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = torch.randint(256, (1, 2560))
    model.config.max_position_embeddings = 2560
    path = tmp_path_factory.mktemp("calibrations") / "found.json"
    calibrate(model, [ids], recall=0.5, min_length=0, progress=False).save(path)
    return path


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Modules stay as they are."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)


@pytest.fixture
def gaining(monkeypatch):
    """No call is predicted to be slower sparse."""
    monkeypatch.setattr(advice, "does_not_pay", lambda *_: False)
    monkeypatch.setattr(advice, "keeps_nearly_all", lambda calls: False)


def values_of(run, command, *arguments):
    ran = run(command, *arguments, "--json", "-q")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def named_in(sentence: str, command: str, end: str) -> list[str]:
    """The arguments of the command that a sentence names before ``end``."""
    (found,) = re.findall(rf"{PROGRAM} {command} (.*?){end}", sentence)
    return shlex.split(found)


def options_of(command: str) -> set[str]:
    found = app.get_command(click.Context(app), command)
    assert found is not None
    return {name for parameter in found.params for name in parameter.opts}


@pytest.mark.parametrize("command", ["explain", "quality", "speed"])
def test_what_is_shared_is_taken_by_each_command(command):
    assert set(SHARED_OPTIONS) <= options_of(command)


def test_a_command_is_quoted_for_a_shell():
    line = CommandLine("my model", {"--text": ("a b.txt", "c.txt"), "--allow-download": ()})
    assert line.write("quality", tokens="1024", min_length=None) == (
        "unisparse-flex quality 'my model' --text 'a b.txt' --text c.txt --tokens 1024 "
        "--allow-download"
    )


def test_explain_names_commands_that_judge_what_it_explained(
    run, model_folder, text, calibration, gaining
):
    options = ("--text", text, "--selector", calibration, "--min-length", "0", "--tokens", "300")
    said = values_of(run, "explain", model_folder, *options)["next"]
    for command, end in (("speed", " times it"), ("quality", " says what")):
        arguments = named_in(said, command, end)
        assert arguments[0] == str(model_folder)
        assert {*map(str, options)} == set(arguments[1:])
        found = values_of(run, command, *arguments)
        assert [row["setting"] for row in found["rows"] if row["setting"]] == ["found.json"]
        said_of = found["selectors"]["found.json"]
        assert re.match(r"found\.json: calibrated at \d+ tokens for recall 0\.5, ", said_of)


@pytest.mark.parametrize(
    ("characters", "options", "kept"),
    [
        (1600, ["--quality", "high"], ["--quality", "high"]),
        # Read whole by explain, and there too.
        (400, [], ["--text", "TEXT", "--tokens", "400"]),
        # Too short to be measured.
        (200, ["--quality", "fast"], ["--quality", "fast"]),
    ],
)
def test_explain_says_how_long_a_short_text_is(
    run, gaining, model_folder, tmp_path, characters, options, kept
):
    path = tmp_path / "a.txt"
    path.write_text((LONG * 40)[:characters], encoding="utf-8")
    given = () if characters > CONTEXT else ("--text", path)
    found = values_of(run, "explain", model_folder, *given, *options, "--min-length", "0")
    said = found["next"]
    arguments = named_in(said, "speed", " times it")
    expected = [str(path) if each == "TEXT" else each for each in kept]
    assert arguments[1:] == [*expected, "--min-length", "0"]


def test_speed_names_the_command_that_says_why(run, model_folder, text):
    options = ("--text", text, "--lengths", "256,300", "--quality", "fast,high", "--repeats", "1")
    found = values_of(run, "speed", model_folder, *options)
    for sentence, setting in zip(found["verdict"], ("fast", "high"), strict=False):
        arguments = named_in(sentence, "explain", r" says why\.")
        shared = ["--text", str(text), "--tokens", "300", "--quality", setting]
        assert arguments == [str(model_folder), *shared]
        report = values_of(run, "explain", *arguments)
        assert [call["decision"] for call in report["calls"]] == ["dense", "dense"]
        assert report["calls"][0]["q_len"] == 300
    assert (
        f"{PROGRAM} quality {shlex.join([str(model_folder), '--text', str(text)])} "
        "--tokens 256,300 --quality fast,high judges many"
    ) in found["notes"][1]


def test_quality_names_the_command_that_says_where(run, model_folder, text, calibration):
    options = ("--text", text, "--lengths", "256", "--selector", calibration)
    found = values_of(run, "quality", model_folder, *options, "--quality", "fast")
    assert [row["setting"] for row in found["rows"]] == ["found.json", "fast"]
    assert named_in(found["verdict"][-1], "explain", r" says whether it would, and where\.") == [
        *(str(model_folder), "--text", str(text), "--tokens", "256", "--selector"),
        str(calibration),
    ]
    plain = values_of(run, "quality", model_folder, "--text", text, "--lengths", "256")
    assert named_in(plain["verdict"][-1], "explain", r" says whether it would, and where\.") == [
        *(str(model_folder), "--text", str(text), "--tokens", "256"),
    ]


@pytest.mark.parametrize("command", ["quality", "speed"])
def test_a_selector_is_measured_under_its_name(run, model_folder, tmp_path, command):
    page = tmp_path / "page.html"
    options = ("--selector", SELECTOR, "--min-length", "0", "--html", page, "--text", "code")
    ran = run(command, model_folder, *options, "--lengths", "256", "-o", tmp_path / "found.json")
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["selectors"] == {SELECTOR: SELECTOR}
    assert found["settings"]["selector"] == SELECTOR
    assert [row["setting"] for row in found["rows"] if row["setting"]] == [SELECTOR]
    assert UniSparse(block_size=32, c_q=8, c_k=8, top_p=0.5).text == SELECTOR
    assert SELECTOR[:15] in ran.out
    assert SELECTOR in page.read_text()
    assert max(map(len, ran.out.splitlines()[:8])) <= 80


@pytest.mark.parametrize("command", ["quality", "speed"])
@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("best", "it must be default, fast, balanced, high, paper, the file of a calibration"),
        ("nowhere.json", "calibrate MODEL TEXT --recall 0.95 --output nowhere.json"),
        ("UniSparse(top_p=7)", "top_p must be in (0, 1], got 7"),
        ("BROKEN", "cannot read the calibration: "),
    ],
)
def test_selectors_are_checked_before_a_model_is_loaded(
    run, model_folder, tmp_path, monkeypatch, command, selector, message
):
    def show(self, step, **_):
        if step.startswith("load /"):
            pytest.fail(step)

    monkeypatch.setattr(Progress, "show", show)
    if selector == "BROKEN":
        selector = tmp_path / "broken.json"
        selector.write_text("{}")
    ran = run(command, model_folder, "--selector", selector)
    assert (ran.code, ran.out) == (2, "")
    said = " ".join(ran.err.split())
    assert message.replace("MODEL", str(model_folder)) in said


@pytest.mark.parametrize("command", ["quality", "speed", "explain"])
def test_a_calibration_of_another_model_is_wrong_usage(
    run, model_folder, calibration, tmp_path, command
):
    values = json.loads(calibration.read_text())
    values["layers"] = {f"other.{name}": value for name, value in values["layers"].items()}
    path = tmp_path / "other.json"
    path.write_text(json.dumps(values))
    ran = run(command, model_folder, "--selector", path, "--tokens", "256", "--text", "code")
    assert (ran.code, ran.out) == (2, "")
    assert "other.model.layers.0" in ran.err
