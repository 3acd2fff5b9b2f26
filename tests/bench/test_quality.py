"""The quality harness reads a real text and writes its curve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import quality
from bench.sweeps import SWEEPS


@pytest.mark.slow
def test_a_curve_is_written_with_density_and_divergence(
    tmp_path: Path,
) -> None:
    output = tmp_path / "quality.json"
    options = "--tokens 256 --judged 64 --block-size 16 --texts code --selectors unisparse-paper"
    more = f"--every 5 --recall-layers 2 --output {output}"
    quality.main([*options.split(), *more.split()])
    written = json.loads(output.read_text())
    few, many = written["rows"]
    assert written["tokens"] == 256
    assert few["parameters"] != many["parameters"]
    assert 0 < few["density"] < many["density"] < 1
    assert few["recall"] < many["recall"] <= 1
    assert few["kl"] > many["kl"] > 0
    assert few["perplexity_ratio"] == pytest.approx(
        few["perplexity"] / (many["perplexity"] / many["perplexity_ratio"])
    )


def test_an_unknown_selector_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main(["--selectors", "xattn"])
    assert "--selectors must be of unisparse-paper" in capsys.readouterr().err


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_goes_from_setting_to_setting(name: str) -> None:
    selectors = SWEEPS[name](64)
    assert len({repr(selector) for selector in selectors}) == len(selectors) > 1
    assert {selector.block_size for selector in selectors} == {64}
