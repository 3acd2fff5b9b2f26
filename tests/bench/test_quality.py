"""The quality harness reads a real text and writes its curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.quality import measure, selection_share
from bench.quality.sweeps import SWEEPS
from unisparse_flex.evaluation import answers
from unisparse_flex.evaluation.measure import generate_greedily


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_curve_is_written_with_density_and_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*args: Any, max_tokens: int, **options: Any) -> list[int]:
        return generate_greedily(*args, max_tokens=min(2, max_tokens), **options)

    monkeypatch.setattr(answers, "generate_greedily", short)
    monkeypatch.setattr(selection_share, "compile_apart", lambda function, name: function)
    output = tmp_path / "quality.json"
    options = "--tokens 320 --judged 64 --block-size 16 --texts code --selectors unisparse-paper"
    more = f"--every 5 --recall-layers 2 --output {output} --tasks niah_single --samples 1"
    measure.main([*options.split(), *more.split()])
    written = json.loads(output.read_text())
    few, many, *answered = written["rows"]
    assert [row["samples"] for row in answered] == [1, 1]
    assert all(0 <= row["task_scores"]["niah_single"] <= 1 for row in answered)
    assert answered[0]["dense_scores"] == answered[1]["dense_scores"]
    assert 0 < answered[0]["density"] < answered[1]["density"] < 1
    assert written["tokens"] == 320
    assert few["parameters"] != many["parameters"]
    assert 0 < few["density"] < many["density"] < 1
    assert few["recall"] < many["recall"] <= 1
    assert 1 > few["output_error"] > many["output_error"] > 0
    assert few["kl"] > many["kl"] > 0
    # Timed once for the selector, and so the same in both rows.
    assert few["selection_ms"] == many["selection_ms"] > 0
    for point in (few, many):
        total = point["selection_ms"] + point["attention_ms"]
        assert point["selection_share"] == pytest.approx(point["selection_ms"] / total)
        assert point["selection_by"] == "PyTorch"
    assert written["selection_timed_at"] == {"unisparse-paper": many["parameters"]}
    assert few["perplexity_ratio"] == pytest.approx(
        few["perplexity"] / (many["perplexity"] / many["perplexity_ratio"])
    )


def test_layers_are_spread_evenly() -> None:
    assert measure.spread(30, 4) == [3, 11, 18, 26]
    assert measure.spread(3, 4) == [0, 1, 2]
    assert measure.spread(30, 1) == [15]
    assert measure.spread(0, 4) == []


def test_an_unknown_selector_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        measure.main(["--selectors", "xattn"])
    assert "--selectors must be of unisparse-default" in capsys.readouterr().err


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_goes_from_setting_to_setting(name: str) -> None:
    selectors = SWEEPS[name](64)
    assert len({repr(selector) for selector in selectors}) == len(selectors) > 1
    assert {selector.block_size for selector in selectors} == {64}
