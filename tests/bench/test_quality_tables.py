"""Curves are compared at equal divergence, between their points."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from bench import quality_tables as tables
from bench.tables import FOLDER, fill
from unisparse_flex import DEFAULT_SELECTOR, UniSparse

ROOT = Path(__file__).parents[2]


def row(selector: str, density: float, kl: float, *, seed: int = 0, text: str = "prose") -> Any:
    return {
        "selector": selector,
        "parameters": f"{selector}({density:.1f})",
        "text": text,
        "seed": seed,
        "density": density,
        "kl": kl,
        "perplexity_ratio": 1 + kl,
    }


def make_result() -> dict[str, Any]:
    """Ours needs half of the paper's density for the same KL."""
    rows: list[Any] = []
    for density in (0.2, 0.4, 0.6):
        kl = math.exp(-10 * density)
        rows += [row("unisparse-paper", density, kl), row(tables.OURS, density / 2, kl)]
    scores: dict[str, Any] = {
        "selector": tables.OURS,
        "parameters": "x",
        "text": None,
        "samples": 2,
    }
    scores |= {"task_scores": {"vt": 0.5}, "dense_scores": {"vt": 0.75}}
    return {
        "model": "a-model",
        "tokens": 512,
        "judged": 64,
        "dtype": "float32",
        "device": "a device",
        "command": ["python", "-m", "bench.quality"],
        "rows": [*rows, scores, {"selector": "oracle", "text": "prose", "error": "out of memory"}],
    }


def test_a_curve_is_sorted_and_averages_excerpts() -> None:
    result = make_result()
    result["rows"] = [
        row("a", 0.4, 0.1) | {"parameters": "many"},
        row("a", 0.2, 0.3) | {"parameters": "few"},
        row("a", 0.3, 0.5, seed=1) | {"parameters": "few"},
    ]
    few, many = tables.curve(result, "a", "prose")
    assert (few.parameters, many.parameters) == ("few", "many")
    assert [few.density, few.kl] == pytest.approx([0.25, 0.4])
    assert tables.curve(result, "a", "code") == []


def test_between_points_the_logarithm_of_the_divergence_is_straight() -> None:
    points = tables.curve(make_result(), "unisparse-paper", "prose")
    assert tables.kl_at(points, 0.3) == pytest.approx(math.exp(-3))
    assert tables.density_at(points, math.exp(-5)) == pytest.approx(0.5)
    assert tables.kl_at(points, 0.2) == pytest.approx(math.exp(-2))


@pytest.mark.parametrize("beyond", [0.1, 0.7])
def test_nothing_is_extrapolated(beyond: float) -> None:
    points = tables.curve(make_result(), "unisparse-paper", "prose")
    assert tables.kl_at(points, beyond) is None
    assert tables.density_at(points, math.exp(-10 * beyond)) is None


def test_ours_is_compared_at_the_divergence_of_the_rival() -> None:
    table = tables.equal_kl_table(make_result())
    [_, _, line] = table.splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:2] == ["prose", "unisparse-paper"]
    assert cells[2:] == [
        "0.50 (KL 0.1353)",
        "0.50 (KL 0.0498)",
        "0.50 (KL 0.0183)",
        "0.50 (KL 0.0067)",
    ]


def test_a_file_becomes_tables_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "quality-x.json"
    path.write_text(json.dumps(make_result()))
    tables.main([str(path), "--plots", str(tmp_path / "plots")])
    printed = capsys.readouterr().out
    assert "| unisparse-paper | 0.400 | 0.0183 | 1.018 |" in printed
    assert "| dense |  | 0.75 |" in printed
    assert (tmp_path / "plots" / "quality-a-model-512.png").stat().st_size > 10_000


def test_the_page_of_selectors_holds_what_the_files_say() -> None:
    page = (ROOT / "docs/selectors.md").read_text()
    named = re.findall(r"<!-- tables of (\S+) -->", page)
    assert sorted(named) == sorted(path.name for path in FOLDER.glob("quality-*.json"))
    assert fill(page, tables.describe) == page


def test_the_page_shows_the_default_as_it_is() -> None:
    page = (ROOT / "docs/selectors.md").read_text()
    [shown] = re.findall(r"^    (UniSparse\(.*\))$", page, flags=re.MULTILINE)
    assert eval(shown, {"UniSparse": UniSparse}) == DEFAULT_SELECTOR
