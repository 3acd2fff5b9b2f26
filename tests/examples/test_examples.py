"""Every example runs as its first lines say, at a small size, and says what it promises."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
# Arguments at a small size, and what the output must hold.
RUNS: dict[str, tuple[list[str], str]] = {
    "plain_pytorch": (["--tokens", "1024"], r"2 of 2 calls sparse(.|\n)*compiled: dense \d"),
    "huggingface_generate": (
        ["--tokens", "1024", "--new-tokens", "3"],
        r"2 of 2 calls sparse(.|\n)*compiled: dense .* s, sparse .* s\ngenerated: \[\d+, ",
    ),
    "export_model": (
        ["--tokens", "600", "--output", "{tmp}/model.pt2"],
        r"after loading: 0\.0e(.|\n)*compiled: dense \d",
    ),
    "custom_selector": (
        ["--tokens", "1024"],
        r"keeps [1-9]\d% of the blocks\n.*finite: True\ndense \d",
    ),
    "block_mask": (["--tokens", "1024"], r"output \(1, 4, 1024, 64\)(.|\n)*dense \d"),
    "calibrate_model": (
        ["--tokens", "512", "--output", "{tmp}/calibration.json"],
        r"30 of 30 calls sparse(.|\n)*recall 0\.9\d+ at density 0\.\d+",
    ),
}
# In tests/vllm, in an environment of its own.
ELSEWHERE = {"vllm_serve"}
ON_GPU = {"train_sparse": (["--tokens", "2048"], r"loss \d+\.\d+ at first(.|\n)* s a step")}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


def run(name: str, arguments: list[str], tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = EXAMPLES / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *(a.format(tmp=tmp) for a in arguments)])
    monkeypatch.chdir(tmp)
    torch._dynamo.reset()
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, promised = RUNS[name]
    run(name, arguments, tmp_path, monkeypatch)
    assert re.search(promised, capsys.readouterr().out)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_an_example_runs_on_a_gpu(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, promised = ON_GPU[name]
    run(name, arguments, tmp_path, monkeypatch)
    assert re.search(promised, capsys.readouterr().out)


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*RUNS, *ON_GPU, *ELSEWHERE}


def cells() -> list[dict[str, Any]]:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    assert notebook["nbformat"] == 4
    found: list[dict[str, Any]] = notebook["cells"]
    return found


def test_the_notebook_is_kept_without_outputs() -> None:
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert code
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in cells()}) == len(cells())


def test_the_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUICKSTART_TOKENS", "1100")
    # Both compilations take minutes here; the model compiles in tests/models.
    monkeypatch.setattr(torch, "compile", lambda model: model)
    names: dict[str, Any] = {"__name__": "quickstart"}
    for place, cell in enumerate(cells()):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {place}", "exec"), names)
    out = capsys.readouterr().out
    assert len(re.findall(r"^(?:dense|sparse): \d+\.\d+ s", out, re.MULTILINE)) == 2
    assert "calls" in out
