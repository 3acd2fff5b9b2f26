"""Every example runs as its first lines say, at a small size, and says what it promises."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
# Arguments at a small size, and what the output must hold.
RUNS: dict[str, tuple[list[str], str]] = {
    "plain_pytorch": (["--tokens", "1024"], r"2 sparse, mean density 0\.\d+, 0 dense"),
    "huggingface_generate": (
        ["--tokens", "1024", "--new-tokens", "3"],
        r"2 attention calls of the prompt ran sparse(.|\n)*\n4 calls of one token each",
    ),
    "export_model": (["--tokens", "600", "--output", "{tmp}/model.pt2"], r"after loading: 0\.0e"),
    "custom_selector": (["--tokens", "1024"], r"keeps [1-9]\d% of the blocks\n.*finite: True"),
    "block_mask": (["--tokens", "1024"], r"output \(1, 4, 1024, 64\)"),
    "calibrate_model": (
        ["--tokens", "1024", "--output", "{tmp}/calibration.json"],
        r"30 sparse, mean density 0\.\d+, 0 dense\n(.|\n)*recall 0\.9\d+ at density 0\.\d+",
    ),
}
ON_GPU = {"train_sparse": (["--tokens", "2048"], r"loss \d+\.\d+ at first")}

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
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*RUNS, *ON_GPU}
