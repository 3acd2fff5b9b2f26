"""Settings in a folder's `config.json` count in every command, where no option says otherwise."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config

from unisparse_flex import UniSparse, explain
from unisparse_flex.cli import models
from unisparse_flex.integrations.transformers import configure, register, unregister
from unisparse_flex.integrations.transformers_config import saved_values

from .conftest import SELECTOR

SAVED = UniSparse(block_size=32, c_q=8, c_k=8, top_p=0.5)


@pytest.fixture
def saved(model_folder, tmp_path):
    """Saves a copy of the model with settings; gives its folder."""

    def save(**settings):
        folder = tmp_path / "saved"
        shutil.copytree(model_folder, folder, dirs_exist_ok=True)
        model = AutoModelForCausalLM.from_pretrained(folder)
        configure(model.config, **settings)
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def uncompiled(monkeypatch):
    """Modules stay as they are."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)


def reported(run, folder, *options, command="explain"):
    ran = run(command, folder, *options, "--json", "-q")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_explain_does_what_transformers_does_with_the_folder(run, saved):
    folder = saved(selector=SAVED, min_length=0, dense_layers=[1])
    report = reported(run, folder, "--tokens", "300")
    assert report["settings"] == {
        "settings from": f"config.json (selector={SAVED.text!r}, min_length=0, dense_layers=[1])",
        "selector": SAVED.text,
        "sparse from": "0 keys (min_length)",
        "prompt": "300 tokens of code",
        "backend": "auto",
        "dense layers": "1",
    }
    register()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="unisparse")
        given = reported(run, folder, "--tokens", "300", "--selector", SELECTOR)
        ids = torch.tensor([list(range(200)) + list(range(100))])
        calls = explain(model.eval(), ids).calls
    finally:
        unregister()
    found = [(call["decision"], call["reason"]) for call in report["calls"]]
    assert found == [(call.decision, call.reason and str(call.reason)) for call in calls]
    # The option says the same here.
    assert [call["density"] for call in report["calls"]] == [
        call["density"] for call in given["calls"]
    ]
    assert [decision for decision, _ in found] == ["sparse", "dense"]


@pytest.mark.parametrize(
    ("options", "source", "selector"),
    [
        (
            ["--quality", "fast"],
            "config.json (dense_layers=[0]); --quality in place of quality='high' in config.json",
            "fast",
        ),
        (
            ["--selector", "balanced", "--dense-layers", "1"],
            "--selector, --dense-layers in place of quality='high', dense_layers=[0] in "
            "config.json",
            "balanced",
        ),
        (["--min-length", "0"], "config.json (quality='high', dense_layers=[0])", "high"),
    ],
)
def test_an_option_wins_over_its_own_part(run, saved, model_folder, options, source, selector):
    report = reported(run, saved(quality="high", dense_layers=[0]), "--tokens", "300", *options)
    assert report["settings"]["settings from"] == source
    plain = reported(run, model_folder, "--tokens", "300", "--selector", selector)
    assert report["settings"]["selector"] == plain["settings"]["selector"]
    assert report["settings"]["dense layers"] == ("1" if "--dense-layers" in options else "0")


def test_text_and_page_say_where_settings_come_from(run, saved, model_folder, tmp_path):
    page = tmp_path / "page.html"
    ran = run("explain", saved(quality="high"), "--tokens", "300", "--html", page)
    assert "settings from: config.json (quality='high')\n" in ran.out
    assert "settings from" in page.read_text()
    assert "settings from" not in run("explain", model_folder, "--tokens", "300").out


@pytest.mark.parametrize(
    ("settings", "name"), [({"quality": "high"}, "high"), ({"selector": SAVED}, "saved")]
)
def test_quality_judges_what_is_saved(run, saved, tmp_path, settings, name):
    folder, page = saved(**settings, dense_layers=[1]), tmp_path / "page.html"
    output = tmp_path / "quality.json"
    options = ("--text", "code", "--lengths", "256", "--output", output, "--html", page)
    ran = run("quality", folder, *options)
    assert ran.code == 0, ran.err
    found = json.loads(output.read_text())
    assert [row["setting"] for row in found["rows"]] == [name]
    assert [row["sparse_calls"] for row in found["rows"]] == [1]
    used = found["settings"]
    assert (used["quality"], used["min_length"], used["dense_layers"]) == ([name], 0, [1])
    assert used["source"].startswith(f"config.json ({next(iter(settings))}=")
    assert f"settings from: {used['source']}" in " ".join(ran.out.split())
    assert "settings from" in page.read_text()
    assert len(found["verdict"]) == (3 if name == "high" else 2)
    asked = reported(run, folder, *options[:4], "--quality", "fast,balanced", command="quality")
    assert [row["setting"] for row in asked["rows"]] == ["fast", "balanced"]
    assert asked["settings"]["source"].startswith("config.json (dense_layers=[1]); --quality in")


def test_speed_times_what_is_saved(run, saved, uncompiled):
    folder = saved(selector=SAVED, min_length=0)
    options = ("--lengths", "256", "--repeats", "1")
    found = reported(run, folder, *options, command="speed")
    assert [row["setting"] for row in found["rows"]] == [None, None, "saved"]
    assert found["selectors"] == {"saved": SAVED.text}
    assert found["settings"]["min_length"] == 0
    assert found["rows"][2]["sparse_calls"] == 2
    dense = reported(run, folder, *options, "--min-length", "9999", command="speed")
    assert dense["rows"][2]["sparse_calls"] == 0
    assert dense["settings"]["source"] == (
        f"config.json (selector={SAVED.text!r}); --min-length in place of min_length=0 in "
        "config.json"
    )


def test_plot_draws_what_is_saved(run, saved, tmp_path):
    pytest.importorskip("matplotlib")
    ran = run("plot", saved(quality="high"), "--tokens", "300", "--output", tmp_path / "figures")
    assert ran.code == 0, ran.err
    assert "settings from: config.json (quality='high')\n" in ran.err


def test_calibrate_says_that_it_goes_by_nothing_saved(run, saved, tmp_path):
    folder = saved(quality="high")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 2560}
    (folder / "config.json").write_text(json.dumps(config))
    options = ("--recall", "0.5", "--tokens", "2560", "--min-length", "0")
    ran = run("calibrate", folder, "code", *options, "-o", tmp_path / "c.json")
    assert ran.code == 0, ran.err
    assert ran.out.endswith("not used: quality='high' in config.json, over which the file wins\n")


def test_of_a_model_of_several_parts_those_of_its_text_count():
    config = Gemma3Config()
    config.unisparse = {"quality": "fast"}
    model = SimpleNamespace(config=config)
    assert saved_values(model) is None
    configure(config.text_config, quality="high")
    assert saved_values(model) == {"quality": "high"}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"quality": "best"}, "config.unisparse: quality must be one of"),
        ({"qualty": "high"}, "config.unisparse must be a dict with keys of quality, selector"),
        ("high", "config.unisparse must be a dict with keys of quality, selector"),
        ({"backend": "triton"}, "--backend triton cannot run here"),
        (
            {"dense_layers": [5]},
            "unisparse.dense_layers in config.json must be of the model's layers, 0 to 1 (or -2 to "
            "-1, from the end), got 5",
        ),
    ],
)
@pytest.mark.parametrize("command", ["explain", "plot", "quality", "speed"])
def test_what_cannot_be_used_is_wrong_usage_before_a_model_is_loaded(
    run, model_folder, tmp_path, monkeypatch, command, written, message
):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    folder = shutil.copytree(model_folder, tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"unisparse": written}))
    ran = run(command, folder, "--text", "code", "--device", "cpu")
    assert ran.code == 2
    assert message in " ".join(ran.err.split())


def test_of_a_folder_of_several_parts_the_settings_of_its_text_are_looked_at(tmp_path):
    saved = {"quality": "high", "min_length": 0}
    parts = {"text_config": {"model_type": "x", "unisparse": saved}, "unisparse": {"quality": "a"}}
    (tmp_path / "config.json").write_text(json.dumps(parts))
    assert models.stated_settings(str(tmp_path)) == saved
    (tmp_path / "config.json").write_text(json.dumps({"unisparse": saved}))
    assert models.stated_settings(str(tmp_path)) == saved
    assert models.stated_settings("smollm2") is None


def test_what_an_option_replaces_is_not_held_against_the_model(run, saved):
    folder = saved(backend="triton", dense_layers=[5])
    options = ("--tokens", "300", "--device", "cpu", "--backend", "auto", "--dense-layers", "1")
    assert reported(run, folder, *options)["settings"]["dense layers"] == "1"
