"""`unisparse-flex calibrate` writes the file that `explain` and `optimize` take."""

from __future__ import annotations

import json
import shutil

import pytest

from unisparse_flex import Calibration
from unisparse_flex.calibrating import run as run_module
from unisparse_flex.calibrating.layer_measure import LayerMeasure
from unisparse_flex.calibrating.search import Search
from unisparse_flex.cli import models

TOKENS = 2560
ZERO = ("--min-length", "0")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("A text of many words, and some of them again. " * 60, encoding="utf-8")
    return path


@pytest.fixture
def long_model(model_folder, tmp_path):
    """The model at a length of which some blocks can be dropped."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": TOKENS}))
    return folder


@pytest.mark.parametrize("target", [("--recall", "0.5"), ("--kl", "0.05")])
def test_the_file_is_a_calibration_that_explain_takes(run, long_model, text, tmp_path, target):
    path = tmp_path / "found" / "calibration.json"
    options = ("--tokens", TOKENS, "--min-length", "0", "--output", path)
    ran = run("calibrate", long_model, text, *target, *options, "--json")
    assert ran.code == 0, ran.err
    found = Calibration.load(path)
    values = json.loads(ran.out)
    notes = ["the KL is the mean over all positions"] if target[0] == "--kl" else []
    assert values.pop("notes")[: len(notes)] == notes
    assert values == json.loads(found.to_json())
    assert Calibration.from_json(ran.out) == found
    assert found.quality == target[0].removeprefix("--")
    assert list(found.layers) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert found.sparse_layers
    explained = run("explain", long_model, "--selector", path, "--tokens", "300", "--json")
    assert explained.code == 0
    said = f"calibrated at {TOKENS} tokens for {found.quality}"
    assert said in json.loads(explained.out)["settings"]["selector"]


def test_the_coarsest_setting_is_called_so(run, long_model, text, tmp_path):
    options = ("--tokens", TOKENS, "--min-length", "0", "-o", tmp_path / "c.json")
    said = "this is the coarsest setting that is tried, which reaches more than was asked for"
    for target, coarsest in ((("--kl", "100"), True), (("--recall", "0.94"), False)):
        ran = run("calibrate", long_model, text, *target, *options)
        assert ran.code == 0, ran.err
        assert (said in " ".join(ran.out.split())) is coarsest
        values = json.loads(run("calibrate", long_model, text, *target, *options, "--json").out)
        assert (said in values["notes"]) is coarsest


def test_what_is_left_of_a_target_is_told(run, long_model, text, tmp_path, monkeypatch):
    said = "more than half of the target is left: this layer stays dense (0)"
    monkeypatch.setattr(run_module, "say_room_left", lambda *_: said)
    options = ("--kl", "100", "--tokens", TOKENS, "--min-length", "0", "-o", tmp_path / "c.json")
    assert said in " ".join(run("calibrate", long_model, text, *options).out.split())
    values = json.loads(run("calibrate", long_model, text, *options, "--json").out)
    assert said in values["notes"]


def test_help_asks_for_prompts_as_long_as_those_to_come(run):
    text = " ".join(run("calibrate", "--help").out.split())
    assert "prompts as long as those to come" in text


def test_several_texts_are_all_read(run, long_model, text, tmp_path):
    options = ("--recall", "0.5", "--tokens", TOKENS, "--min-length", "0")
    ran = run("calibrate", long_model, text, "code", *options, "-o", tmp_path / "c.json")
    assert ran.code == 0
    assert ran.out.startswith("recall ")
    assert "of 2 layers sparse" in " ".join(ran.out.split())
    assert "over all positions" not in ran.out
    assert ran.err.endswith(f"wrote {tmp_path / 'c.json'}\n")


def test_a_file_that_was_there_is_said_to_be_replaced(run, long_model, text, tmp_path):
    path = tmp_path / "c.json"
    options = ("--kl", "100", "--tokens", TOKENS, "--min-length", "0", "-o", path)
    first, second = (run("calibrate", long_model, text, *options) for _ in range(2))
    assert first.err.endswith(f"wrote {path}\n")
    assert second.err.endswith(f"replaced {path}\n")
    assert "over all positions (asked for 100)" in " ".join(first.out.split())


def test_where_optimize_leaves_layers_dense_the_command_says_from_when_on(
    run, long_model, text, tmp_path, monkeypatch
):
    said = (
        "at 2560 tokens optimize leaves these layers (0-1) dense too; sparse from 9999 on, or with "
    )
    monkeypatch.setattr(run_module, "say_left_dense", lambda *_: f"{said}min_length=0")
    options = ("--tokens", TOKENS, "--min-length", "0", "-o", tmp_path / "c.json")
    ran = run("calibrate", long_model, text, "--kl", "100", *options)
    assert f"{said}--min-length 0" in " ".join(ran.out.split())
    values = json.loads(run("calibrate", long_model, text, "--kl", "100", *options, "--json").out)
    assert f"{said}--min-length 0" in values["notes"]


def test_a_target_that_nothing_reaches_is_told_with_ways_out(
    run, long_model, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(Search, "_measure_kl", lambda *_: 1.0)
    options = ("--kl", "0.001", "--tokens", TOKENS, "-o", tmp_path / "c.json")
    said = "reaches a kl of 0.001; longer prompts"
    for more, ways in (((), ", a larger --kl, or --min-length 0 for"), (ZERO, " or a larger --kl")):
        # Some setting costs less, whatever this machine's rates are.
        monkeypatch.setattr(LayerMeasure, "could_be_faster", True)
        ran = run("calibrate", long_model, text, *options, *more)
        assert ran.code == 1
        assert f"{said}{ways}" in " ".join(ran.err.split())


def test_a_result_that_gains_nothing_is_no_success(run, long_model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("unisparse_flex.calibrating.search.NEARLY_ALL", 0.1)
    path = tmp_path / "c.json"
    options = ("--kl", "100", "--tokens", TOKENS, "--min-length", "0", "-o", path)
    ran = run("calibrate", long_model, text, *options)
    assert (ran.code, path.exists()) == (1, False)
    assert "nothing was written: nothing is gained, a kl of 100 keeps" in ran.said
    assert ran.said.endswith("% of the blocks; longer prompts or a larger --kl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give exactly one of --recall and --kl"),
        (["--recall", "0.9", "--kl", "0.1"], "give exactly one of --recall and --kl"),
        (["--recall", "1.5"], "recall must be in (0, 1], got 1.5"),
        (["--kl", "-1"], "kl must be above 0 and finite, got -1.0"),
        (["--recall", "nan"], "recall must be in (0, 1], got nan"),
        (["--recall", "0.9", "--tokens", "500000"], "--tokens must be at most"),
    ],
)
def test_wrong_arguments_write_nothing(run, model_folder, text, tmp_path, options, message):
    path = tmp_path / "c.json"
    ran = run("calibrate", model_folder, text, *options, "--output", path)
    assert ran.code == 2
    assert message in ran.err.replace("\n", " ")
    assert not path.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["prose", "--recall", "1.5"],
        ["prose", "--recall", "0.9", "--kl", "0.1"],
        ["nowhere.txt", "--recall", "0.9"],
        ["prose", "--recall", "0.9", "--output", "."],
    ],
)
def test_arguments_are_checked_before_a_model_is_loaded(run, model_folder, monkeypatch, options):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert run("calibrate", model_folder, *options).code == 2


def test_a_text_is_not_written_over(run, model_folder, text):
    before = text.read_text()
    ran = run("calibrate", model_folder, text, "--recall", "0.9", "--output", text)
    assert ran.code == 2
    assert "--output must not be a file that is read" in ran.err
    assert text.read_text() == before


def test_a_text_of_no_characters_is_refused(run, model_folder, tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("")
    ran = run("calibrate", model_folder, path, "--recall", "0.9")
    assert ran.code == 2
    assert "a text must not be empty" in ran.err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--tokens", "64"], "no call could be sparse with any setting: few queries"),
        (["--tokens", "300"], "longer prompts, or --min-length 0 for the fewest blocks"),
        (["--tokens", "300", "--min-length", "0"], "every setting keeps all blocks at this length"),
    ],
)
def test_where_every_layer_stays_dense_nothing_is_written(
    run, model_folder, text, tmp_path, options, reason
):
    path = tmp_path / "c.json"
    ran = run("calibrate", model_folder, text, "--recall", "0.9", *options, "-o", path, "-q")
    assert ran.code == 1
    assert ran.err.startswith("Error: all layers stay dense, and nothing was written: ")
    assert reason in " ".join(ran.err.split())
    assert ran.out == ""
    assert not path.exists()
    ran = run("calibrate", model_folder, text, "--recall", "0.9", *options, "-o", path, "--json")
    assert (ran.code, path.exists()) == (1, False)
    values = json.loads(ran.out)
    assert set(values["layers"].values()) == {"dense"}
    (why,) = values["notes"]
    assert why.startswith("all layers stay dense: ")
    assert reason in why
