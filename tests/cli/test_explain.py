"""`unisparse-flex explain`: text, JSON and page say the same about a tiny model."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from unisparse_flex import explain, optimize
from unisparse_flex.cli import models
from unisparse_flex.reports import timing

from .conftest import CONTEXT, SELECTOR
from .test_page import Page

KEYS = {
    *("schema", "kind", "model", "model_class", "settings", "device", "versions", "summary"),
    *("verdict", "calls", "notes", "next"),
}
CALL_KEYS = {
    *("layer", "module", "q_len", "kv_len", "heads", "masked", "decision", "reason", "density"),
    "window",
    *("predicted", "measured", "unjudged", "plain_selection", "own_kernel"),
}
SPARSE = ("--selector", SELECTOR, "--min-length", "0")


def explained(run, folder, *options):
    ran = run("explain", folder, *options, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_json_has_the_promised_keys(run, model_folder):
    report = explained(run, model_folder, *SPARSE, "--tokens", "300")
    assert set(report) == KEYS
    assert [set(call) for call in report["calls"]] == [CALL_KEYS] * 2
    assert report["kind"] == "explain"
    assert report["model_class"] == "LlamaForCausalLM"
    assert report["settings"]["prompt"] == "300 tokens of code"
    assert report["versions"]["torch"]


def test_sparse_calls_have_a_density_and_a_prediction(run, model_folder):
    report = explained(run, model_folder, *SPARSE, "--tokens", "300")
    first = report["calls"][0]
    assert first["layer"] == "model.layers.0.self_attn"
    assert first["module"] == "LlamaAttention"
    assert (first["q_len"], first["kv_len"], first["heads"]) == (300, 300, "3/1")
    assert (first["decision"], first["reason"], first["measured"]) == ("sparse", None, None)
    assert 0 < first["density"] < 1
    assert first["predicted"]["dense_ms"] > 0
    densities = [call["density"] for call in report["calls"]]
    assert report["summary"]["density"] == pytest.approx(sum(densities) / 2)
    total = sum(call["predicted"]["sparse_ms"] for call in report["calls"])
    summary = report["summary"]
    assert summary["predicted"]["decided_ms"] == pytest.approx(total)
    assert summary["rest_ms"] > 0
    whole = summary["predicted_prefill"]["decided_ms"]
    assert whole == pytest.approx(total + summary["rest_ms"])


def test_dense_calls_name_their_reason(run, model_folder):
    report = explained(run, model_folder, "--tokens", "300", "--dense-layers", "0")
    assert [call["decision"] for call in report["calls"]] == ["dense", "dense"]
    assert report["calls"][0]["reason"] == "layer excluded by the settings"
    assert report["calls"][1]["reason"] == "the cost model predicts that dense is faster"
    predicted = report["summary"]["predicted"]
    assert predicted["dense_ms"] == predicted["decided_ms"]


@pytest.mark.parametrize(("quality", "same"), [("fast", "fast"), ("1", "balanced")])
def test_a_quality_is_a_setting_of_the_dial(run, model_folder, quality, same):
    options = ("--tokens", "300", "--min-length", "0")
    report = explained(run, model_folder, *options, "--quality", quality)
    other = explained(run, model_folder, *options, "--selector", same)
    assert report["settings"] == other["settings"]


def test_layers_are_given_as_ranges_and_advice_gives_them_back(run, model_folder):
    report = explained(run, model_folder, "--tokens", "300", "--dense-layers", "0-1")
    assert report["settings"]["dense layers"] == "0, 1"
    assert {call["reason"] for call in report["calls"]} == {"layer excluded by the settings"}
    assert report["next"].startswith("leave layers out of --dense-layers")


def without_timed(text: str) -> str:
    """A text without what differs from run to run."""
    return re.sub(
        r"whole prefill (no gain|[\d.]+(x as fast| times as long))", "whole prefill", text
    )


def test_text_and_page_hold_what_json_does(run, model_folder, tmp_path):
    page = tmp_path / "pages" / "explain.html"
    ran = run("explain", model_folder, *SPARSE, "--tokens", "300", "--html", page)
    assert ran.code == 0
    assert f"wrote {page}" in ran.err
    report = explained(run, model_folder, *SPARSE, "--tokens", "300")
    html = page.read_text(encoding="utf-8")
    for call in report["calls"]:
        assert f"{call['density']:.3f}" in ran.out
        assert f"{call['density']:.1%}" in html
    assert ran.out.startswith("2 of 2 calls sparse, ")
    for said in (report["verdict"], report["next"]):
        assert without_timed(said) in without_timed(" ".join(ran.out.split()))
        assert without_timed(said) in without_timed("".join(Page(html).text))
    assert str(model_folder) in html


def test_no_sparse_time_is_shown_of_a_layer_that_is_excluded(run, model_folder, tmp_path):
    page = tmp_path / "explain.html"
    options = ("--tokens", "300", "--dense-layers", "0")
    ran = run("explain", model_folder, *options, "--html", page)
    first, second = (
        line.split() for line in ran.out.splitlines() if re.search(r"layers\.\d", line)
    )
    # Layer, keys, heads, dense, milliseconds dense (and sparse), sparse from, why.
    assert (len(first), len(second)) == (7, 8)
    cells = re.findall(
        r"×.*?</td>\s*<td>[^<]*</td>\s*<td>([^<]*)</td>\s*<td>([^<]*)</td>",
        page.read_text(encoding="utf-8"),
    )
    assert [(dense == "–", sparse == "–") for dense, sparse in cells] == [
        (False, True),
        (False, False),
    ]
    values = explained(run, model_folder, *options)["calls"]
    assert all(call["predicted"]["sparse_ms"] > 0 for call in values)


def test_measured_times_are_those_of_each_call(run, model_folder, monkeypatch, tmp_path):
    compiled = []

    def record(call, config):
        compiled.append(config)
        return call.run_dense()

    monkeypatch.setattr(timing, "run_compiled", record)
    report = explained(run, model_folder, "--tokens", "300", "--measure", "--dense-layers", "0")
    assert len(compiled) == 2 * (1 + timing.REPEATS)
    assert {(config.min_length, config.dense) for config in compiled} == {(0, False)}
    times = [call["measured"] for call in report["calls"]]
    assert all(time["dense_ms"] > 0 and time["sparse_ms"] > 0 for time in times)
    measured = report["summary"]["measured"]
    assert measured["decided_ms"] == measured["dense_ms"]
    page = tmp_path / "explain.html"
    options = ("--tokens", "300", "--measure", "--dense-layers", "0", "--html", page)
    text = run("explain", model_folder, *options).out
    assert "measured ms " in text
    # Of the layer that is excluded no sparse time is shown.
    rows = re.findall(r"layers\.\d\S+ ((?: +\d+\.\d\d)+)$", text, re.MULTILINE)
    assert [len(row.split()) for row in rows] == [1, 2]
    cells = re.findall(r"<td>([^<]*)</td>\s*<td class=\"left\">\[", page.read_text("utf-8"))
    assert [cell == "–" for cell in cells] == [True, False]
    assert "measured, attention only: " in text


@pytest.mark.slow
def test_measuring_compiles_the_sparse_call(run, model_folder):
    report = explained(run, model_folder, *SPARSE, "--tokens", "300", "--measure")
    assert all(call["measured"]["sparse_ms"] > 0 for call in report["calls"])


def test_a_file_is_read_up_to_the_model_s_context(run, model_folder, tmp_path):
    text = tmp_path / "prompt.txt"
    text.write_text("Grüße, " * 200, encoding="utf-8")
    report = explained(run, model_folder, "--text", text)
    assert report["settings"]["prompt"] == f"{CONTEXT} tokens of {text}"
    text.write_text("short", encoding="utf-8")
    assert explained(run, model_folder, "--text", text)["calls"][0]["q_len"] == 5


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--tokens", "513"], 2, "--tokens must be at most the model's context, 512, got 513"),
        (["--text", "nowhere.txt"], 2, "a text must be a file or one of prose, code, topics"),
        (["--selector", "open('x')"], 2, "a selector must be a call with literals by name"),
        (["--selector", "UniSparse(top_p=2)"], 2, "top_p must be in (0, 1], got 2"),
        (["--selector", "UniSparse(topp=1)"], 2, "no setting 'topp', got 'UniSparse(topp=1)'; did"),
        (["--selector", "quality"], 2, "must be default, fast, balanced, high, paper, the file of"),
        (["--selector", "nowhere.json"], 2, "there is no file nowhere.json"),
        (["--dense-layers", "9"], 2, "--dense-layers must be of the model's layers, 0 to 1"),
        (["--dense-layers", "0,a"], 2, "such as 0,1,-1 or ranges such as 0-10, got 'a'"),
        (["--dense-layers", "5-2"], 2, "must go from a layer up to a later one, got '5-2'"),
        (["--quality", "best"], 2, "--quality must be of fast, balanced, high and numbers"),
        (["--quality", "high", "--selector", "paper"], 2, "give --quality or --selector, not both"),
        (["--selector", "paper", "--quality", "high"], 2, "give --quality or --selector, not both"),
        (["--device", "tpu"], 2, "--device must be cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_wrong_options_say_the_rule(run, model_folder, options, code, message):
    ran = run("explain", model_folder, *options)
    assert ran.code == code
    assert message in ran.err.replace("\n", " ")


def test_bytes_that_are_no_text_are_refused(run, model_folder, tmp_path):
    path = tmp_path / "prompt.bin"
    path.write_bytes(b"\xff\xfe\x00")
    ran = run("explain", model_folder, "--text", path)
    assert ran.code == 2
    assert f"cannot read {path} as UTF-8" in ran.said


def test_a_calibration_that_is_none_is_a_wrong_argument(run, model_folder, tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"calls": [], "kind": "explain"}')
    ran = run("explain", model_folder, "--selector", path)
    assert ran.code == 2
    message = " ".join(ran.err.split())
    assert "must be a JSON object with layers, got one with calls, kind; write a new" in message


def test_a_page_is_not_written_over_what_is_read(run, model_folder, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("words " * 100)
    ran = run("explain", model_folder, "--text", path, "--html", tmp_path / "." / "prompt.txt")
    assert ran.code == 2
    assert f"--html must not be a file that is read, got {path}" in ran.said
    assert path.read_text().startswith("words")


@pytest.mark.parametrize("terminal", [True, False])
def test_errors_are_broken_between_words(run, model_folder, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    lines = run("explain", model_folder, "--selector", "quality").err.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Error: "))
    assert len(lines) > start + 1
    assert max(map(len, lines[start:])) <= 80
    assert len(f"{lines[start]} {lines[start + 1].split()[0]}") > 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "nowhere.txt"], "which is not there"),
        (["--text", "."], "a folder"),
        (["--selector", "quality"], "balanced"),
        (["--html", "."], "it must be a file, got ., a folder"),
        (["--html", "setup.txt/page.html"], "is no folder"),
        (["--device", "tpu"], "--device must be"),
        (["--dense-layers", "a"], "layers must be"),
        (["--min-length", "-1"], "-1 is not in the range"),
        (["--tokens", "513"], "at most the model's context, 512, got 513"),
    ],
)
def test_arguments_are_checked_before_a_model_is_loaded(
    run, model_folder, monkeypatch, tmp_path, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.txt").write_text("a file")
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    ran = run("explain", model_folder, *options)
    assert ran.code == 2
    assert message in ran.err


def test_every_line_fits_in_80_columns(run, model_folder, monkeypatch):
    # Faster than dense attention, whatever else the machine does.
    monkeypatch.setattr(timing, "run_compiled", lambda call, config: call.query)
    ran = run("explain", model_folder, *SPARSE, "--tokens", "300", "--measure")
    lines = [line for line in ran.out.splitlines() if str(model_folder) not in line]
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("2 of 2 calls sparse")
    assert "\nnext:\n  unisparse-flex speed " in ran.out


def test_a_calibration_is_said_once_as_python_says_it(run, model_folder, save_calibration):
    from transformers import AutoModelForCausalLM

    path = save_calibration(1, (100,))
    report = explained(run, model_folder, "--selector", path, "--tokens", "300")
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    note, *_ = explain(optimize(model, path), torch.ones(1, 300, dtype=torch.long)).notes()
    said = "calibrated at 100 tokens for kl 0.01, 1 layer sparse; its target was not looked at for"
    assert note == f"selector: {said} 300 tokens"
    assert report["settings"]["selector"] == f"{path}: {said} 300 tokens"
    assert not [each for each in report["notes"] if "calibrated" in each]
    ran = run("explain", model_folder, "--selector", path, "--tokens", "300")
    assert " ".join(ran.out.split()).count("calibrated at 100 tokens") == 1
