"""The example of the serving page runs, at a small size."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "vllm_serve.py"


@pytest.mark.slow
def test_the_example_says_what_ran_sparse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tokens", "1500", "--chunk", "640", "--new-tokens", "3"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    promised = (
        r"vLLM alone: first token \d+\.\d\d s, answer \[\d+, \d+, \d+\]\n(.|\n)*"
        r"with sparse prefill: first token \d+\.\d\d s, answer \[\d+, \d+, \d+\]\n(.|\n)*"
        r"unisparse: 3 prefill rows of 1500 tokens sparse, \d+ of \d+ blocks read \([5-9]\d"
    )
    assert re.search(promised, capsys.readouterr().out)
