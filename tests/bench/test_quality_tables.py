"""Curves are compared at equal divergence, between their points."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from bench.figures.front_sentences import equal_sentence, lengths_sentence, rivals_sentence
from bench.figures.front_tables import claims_table
from bench.quality import curves, tables
from bench.quality.plots import draw
from bench.quality.summary import COLUMNS, OURS, summary_table
from bench.tables import main
from unisparse_flex import UniSparse
from unisparse_flex.selectors import DEFAULT_SELECTOR

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
        rows += [row("unisparse-paper", density, kl), row(OURS, density / 2, kl)]
    return {
        "model": "a-model",
        "tokens": 512,
        "judged": 64,
        "dtype": "float32",
        "device": "a device",
        "command": ["python", "-m", "bench.quality"],
        "rows": [*rows, {"selector": "oracle", "text": "prose", "error": "out of memory"}],
    }


def scores(
    selector: str, parameters: str, *, density: float = 0.25, **by_task: tuple[float, float]
) -> dict[str, Any]:
    """A row of tasks: each one's score and the dense model's."""
    return {
        "density": density,
        "selector": selector,
        "parameters": parameters,
        "text": None,
        "task_scores": {name: own for name, (own, _) in by_task.items()},
        "dense_scores": {name: dense for name, (_, dense) in by_task.items()},
        "samples": 20,
    }


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_curve_is_sorted_and_averages_excerpts() -> None:
    result = make_result()
    result["rows"] = [
        row("a", 0.4, 0.1) | {"parameters": "many"},
        row("a", 0.2, 0.3) | {"parameters": "few"},
        row("a", 0.3, 0.5, seed=1) | {"parameters": "few"},
    ]
    few, many = curves.curve(result, "a", "prose")
    assert (few.parameters, many.parameters) == ("few", "many")
    assert [few.density, few.kl] == pytest.approx([0.25, 0.4])
    assert (few.excerpts, many.excerpts) == (2, 1)
    assert curves.curve(result, "a", "code") == []


def test_between_points_the_logarithm_of_the_divergence_is_straight() -> None:
    points = curves.curve(make_result(), "unisparse-paper", "prose")
    assert curves.kl_at(points, 0.3) == pytest.approx(math.exp(-3))
    assert curves.density_at(points, math.exp(-5)) == pytest.approx(0.5)
    assert curves.kl_at(points, 0.2) == pytest.approx(math.exp(-2))


@pytest.mark.parametrize("beyond", [0.1, 0.7])
def test_nothing_is_extrapolated(beyond: float) -> None:
    points = curves.curve(make_result(), "unisparse-paper", "prose")
    assert curves.kl_at(points, beyond) is None
    assert curves.density_at(points, math.exp(-10 * beyond)) is None


def test_ours_is_compared_at_the_divergence_of_the_rival() -> None:
    table = tables.equal_kl_table(make_result())
    [_, _, line] = table.splitlines()
    assert cells(line) == [
        "prose",
        "unisparse-paper",
        "",
        "0.50 (KL 0.1353)",
        "0.50 (KL 0.0498)",
        "0.50 (KL 0.0183)",
        "0.50 (KL 0.0067)",
    ]


def test_trials_are_compared_behind_the_rivals() -> None:
    result = make_result()
    result["rows"] += [row("trial-x", d / 2 + 0.1, math.exp(-10 * d)) for d in (0.2, 0.4, 0.6)]
    *_, line = tables.equal_kl_table(result).splitlines()
    assert cells(line)[:2] == ["prose", "trial-x"]
    # Ours keeps .1 less for any KL.
    assert cells(line)[2:] == ["", "0.50 (KL 0.1353)", "0.67 (KL 0.0183)", "0.75 (KL 0.0025)", ""]


def test_seeds_are_averaged_and_counted() -> None:
    result = make_result()
    measured = {
        "recall": 0.9,
        "output_error": 0.2,
        "selection_share": 0.25,
        "selection_by": "kernels",
    }
    result["rows"] = [
        row("a", 0.3, 0.1) | measured,
        row("a", 0.31, 0.3, seed=1)
        | {"parameters": "a(0.3)"}
        | measured
        | {"recall": 0.7, "output_error": 0.3},
        row("b", 0.3, 0.5) | measured,
        row("b", 0.31, 0.5, seed=1) | {"parameters": "b(0.3)"},
    ]
    head, _, first, second = tables.curves_table(result, "prose").splitlines()
    assert cells(head)[4:8] == ["recall", "output error", "selection's share", "excerpts"]
    assert cells(first) == [
        "a",
        "0.305",
        "0.2000",
        "1.200",
        "0.8000",
        "0.250",
        "25% (kernels)",
        "2",
        "`a(0.3)`",
    ]
    # These three are judged on the first excerpt of each text, and on no other.
    assert cells(second)[4:8] == ["0.9000", "0.200", "25% (kernels)", "2"]


def test_scores_of_tasks_stand_beside_the_dense_ones() -> None:
    result = make_result()
    result["rows"] += [
        scores(OURS, f"{OURS}(0.1)", vt=(0.6, 0.75), cwe=(0.0, 0.0)),
        scores("oracle", "unread", vt=(0.75, 0.75), cwe=(0.2, 0.0)),
    ]
    head, _, *lines = tables.tasks_table(result).splitlines()
    assert cells(head) == [
        "selector",
        "density",
        "samples of a task",
        "vt",
        "cwe",
        "mean",
        "setting",
    ]
    dense, ours, oracle = map(cells, lines)
    assert dense == ["dense", "", "20", "0.750", "0.000", "0.375", ""]
    setting = f"`{OURS}(0.1)`"
    mean = "0.300 (0.80)"
    assert ours == [OURS, "0.250", "20", "0.600 (0.80)", "0.000", mean, setting]
    assert oracle == ["oracle", "0.250", "20", "0.750 (1.00)", "0.200", "0.475 (1.27)", "`unread`"]
    more = scores("oracle", "unread", density=0.75, vt=(0.25, 0.25), cwe=(0.4, 0.0))
    result["rows"].append(more)
    *_, oracle = map(cells, tables.tasks_table(result).splitlines())
    assert oracle[1:5] == ["0.500", "40", "0.500 (1.00)", "0.300"]


def test_a_file_becomes_tables_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "quality-x.json"
    result = make_result()
    result["rows"].append(scores(OURS, "x", vt=(0.5, 0.75)))
    path.write_text(json.dumps(result))
    main([str(path), "--plots", str(tmp_path / "plots")])
    printed = capsys.readouterr().out
    assert "| unisparse-paper | 0.400 | 0.0183 | 1.018 |  |  |  | 1 |" in printed
    assert "| dense |  | 20 | 0.750 |" in printed
    assert (tmp_path / "plots" / "quality-x.png").stat().st_size > 10_000


def test_a_file_of_tasks_alone_has_no_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "quality-x.json"
    path.write_text(json.dumps(make_result() | {"rows": [scores("oracle", "x", vt=(0.5, 0.75))]}))
    main([str(path), "--plots", str(tmp_path / "plots")])
    printed = capsys.readouterr().out
    assert "### Tasks" in printed
    assert "Curves" not in printed
    assert not (tmp_path / "plots").exists()


def test_what_was_measured_on_captured_calls_has_panels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []

    def keep(self: Any, path: Path, **options: Any) -> None:
        drawn.append(self)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    plain, measured = make_result(), make_result()
    for place, entry in enumerate(row for row in measured["rows"] if "kl" in row):
        entry |= {"recall": 0.9, "output_error": 0.2}
        entry |= {"selection_share": place / 10, "selection_by": "PyTorch"}
    for result in (plain, measured):
        draw(result, tmp_path / "plot.png", emphasized=OURS)
    labels = [[axes.get_ylabel() for axes in one.axes] for one in drawn]
    more = ["recall", "error of the output", "selection's share of time"]
    assert labels == [["KL to dense"], ["KL to dense", *more]]
    shares = drawn[1].axes[3].get_lines()
    found = [list(line.get_ydata()) for line in shares]
    assert found == [[0.0, 0.2, 0.4], [0.1, 0.3, 0.5]]


def test_the_summary_compares_at_the_kl_of_one_setting() -> None:
    result = make_result()
    result["rows"][-1] = row("oracle", 0.1, math.exp(-4))
    result["rows"].append(row("oracle", 0.3, math.exp(-8)))
    [line] = summary_table([result], selector=f"{OURS}(0.2)").splitlines()[2:]
    assert len(COLUMNS) == len(cells(line))
    # The paper's curve has this KL at .4, the oracle's at .1; at .2 the oracle's is e**-6.
    assert cells(line) == [
        "a-model, 512, prose (1)",
        "0.200",
        f"{math.exp(-4):.4f}",
        f"{1 + math.exp(-4):.4f}",
        "0.50",
        "",
        f"2.00 ({math.exp(2):.2f})",
    ]


def test_settings_are_told_apart_by_what_differs() -> None:
    few, many = UniSparse.paper(top_p=0.7), UniSparse.paper(top_p=0.9)
    result = make_result()
    result["rows"] = [
        row("paper", 0.2, 0.1) | {"parameters": repr(few)},
        row("paper", 0.3, 0.05) | {"parameters": repr(many)},
    ]
    assert tables.varying_settings(result) == {repr(few): "top_p=0.7", repr(many): "top_p=0.9"}
    [line] = tables.settings_table(result).splitlines()[2:]
    common = cells(line)[1].strip("`")
    assert eval(common.replace(")", ", top_p=0.7)"), {"UniSparse": UniSparse}) == few
    assert "top_p" not in common


def test_the_page_shows_the_default_as_it_is() -> None:
    page = (ROOT / "docs/selectors.md").read_text()
    [shown] = re.findall(r"## The default\n\n((?:    .*\n)+)", page)
    assert eval(dedent(shown), {"UniSparse": UniSparse}) == DEFAULT_SELECTOR


def test_sentences_of_equal_kl_say_what_the_table_of_claims_does() -> None:
    *_, prose, code, _ = [line for line in claims_table().splitlines() if "equal KL" in line] + [""]
    ends = {}
    for text, row in (("prose", prose), ("code", code)):
        numbers = re.findall(r"\d\.\d\d", row.partition("equal KL")[2].partition("|")[0])
        ends[text] = min(numbers), max(numbers)
    said = equal_sentence()
    assert f"at 32768 tokens {' to '.join(ends['prose'])} on prose" in said
    assert f"and {' to '.join(ends['code'])} on code" in said
    least, most = re.findall(r"\d\.\d\d", rivals_sentence())[2:]
    assert float(least) == pytest.approx(1 / float(ends["code"][1]), abs=0.02)
    assert float(most) == pytest.approx(1 / float(ends["code"][0]), abs=0.02)


def test_single_texts_are_no_closer_than_their_mean() -> None:
    for part in lengths_sentence().split("; "):
        _, most, single = map(float, re.findall(r"(?<!\d)0\.\d{3}", part))
        assert single >= most
