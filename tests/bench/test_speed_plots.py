"""What is drawn are the ratios of the rows, and break-even lies on the drawn lines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import registry
from bench.attention import density_name, sparse_rows
from bench.figures import speed_plots
from bench.figures.front import SPEED
from bench.figures.front_sentences import break_even
from bench.figures.front_tables import DECISIONS
from bench.figures.speed_plots import (
    BreakEven,
    Curve,
    curves,
    decided,
    default_prompts,
    draw,
    first_token,
)
from bench.record import FOLDER
from tests.bench.results import DENSITIES, LENGTHS, make_result
from unisparse_flex.selectors import DEFAULT_SELECTOR

SPARSE: dict[str, Any] = {"variant": "sparse", "selector": "two", "density": 0.1}


def make_launched() -> dict[str, Any]:
    """Every call takes 1.4 ms longer when it is launched from Python."""
    result = make_result()
    for row in result["rows"]:
        if "total_ms" in row:
            row["total_plain_ms"] = row["total_ms"] + 1.4
    return result


def make_prefill() -> dict[str, Any]:
    rows = [
        {"variant": "dense_eager", "tokens": 32768, "ms": 1400.0, "speedup": 1.0},
        {"variant": "dense_compiled", "tokens": 32768, "ms": 1200.0, "speedup": 1.0},
        SPARSE | {"tokens": 32768, "ms": 800.0, "speedup": 1.5},
        SPARSE | {"tokens": 8192, "ms": 300.0},
        SPARSE | {"tokens": 65536, "errors": {"run": "out of memory"}},
        SPARSE | {"tokens": 32768, "ms": 700.0, "selector": "paper"},
    ]
    return {"device": "a device", "model": {"layers": 3}, "rows": rows}


def decision(tokens: int, decision: str, **other: Any) -> dict[str, Any]:
    row = {"shape": "llama3-8b", "layers": 0, "tokens": tokens, "queries": tokens}
    default = {"selector": repr(DEFAULT_SELECTOR), "density": 0.5, "ratio": 1.25}
    return row | {"decision": decision} | default | other


def drawn(axes: Any, kind: str) -> dict[str, list[tuple[float, float]]]:
    """Points of the lines of a panel that are called ``kind`` and a name, by this name."""
    lines = {str(line.get_gid()): line for line in axes.get_lines()}
    return {
        name.removeprefix(f"{kind} "): list(zip(*line.get_data(), strict=True))
        for name, line in lines.items()
        if name.startswith(f"{kind} ")
    }


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def bands(axes: Any) -> list[tuple[float, float]]:
    found = [patch for patch in axes.patches if patch.get_gid() == "decided"]
    return [(band.get_x(), band.get_x() + band.get_width()) for band in found]


def arrows(axes: Any) -> dict[str, tuple[float, float]]:
    found = {str(text.get_gid()): text for text in axes.texts if text.get_gid()}
    return {name.removeprefix("below "): text.xy for name, text in found.items()}


def test_a_speedup_is_that_of_the_whole_call_over_the_fastest_dense_kernel() -> None:
    found = curves(make_result(), "llama3-8b", "two")
    assert [curve.density for curve in found] == list(DENSITIES)
    assert [tokens for tokens, _ in found[1].points] == list(LENGTHS)
    # 32768 tokens: 32 ms by cuDNN; 1 ms of selection and 8 ms of attention at 10%.
    assert dict(found[1].points)[32768] == pytest.approx(32 / 9)


def test_the_committed_ratios_are_those_of_the_tables() -> None:
    result = json.loads((FOLDER / SPEED).read_text())
    rows = sparse_rows(result, "llama3-8b", "default")
    expected = {(r["density"], r["tokens"]): r["speedup_best"] for r in rows if "speedup_best" in r}
    found = {(c.density, x): y for c in curves(result, "llama3-8b", "default") for x, y in c.points}
    assert len(found) > 20
    assert found == pytest.approx(expected)


def test_a_curve_breaks_even_on_its_straight_line() -> None:
    # From 1/2 to 2: half of the way between the logarithms.
    even = Curve(0.1, ((4096, 0.5), (16384, 2.0), (32768, 3.0))).break_even
    assert even.tokens == pytest.approx(8192)
    assert (even.side, str(even)) == ("at", "8.0k")
    # A third of the way: 2 ** (12 + 2 / 3).
    even = Curve(0.1, ((4096, 0.5), (16384, 4.0))).break_even
    assert even.tokens == pytest.approx(4096 * 2 ** (2 / 3))


def test_a_curve_breaks_even_where_it_rises_for_good() -> None:
    even = Curve(0.1, ((1024, 2.0), (2048, 0.5), (8192, 2.0))).break_even
    assert even.tokens == pytest.approx(4096)
    assert even.side == "at"
    assert Curve(0.1, ((1024, 0.5), (2048, 1.0))).break_even == BreakEven(2048, "at")


def test_outside_of_what_was_measured_only_the_side_is_known() -> None:
    below = Curve(0.1, ((4096, 1.5), (8192, 2.0))).break_even
    above = Curve(None, ((4096, 1.5), (8192, 0.5))).break_even
    assert (below, above) == (BreakEven(4096, "below"), BreakEven(8192, "above"))
    assert (str(below), str(above)) == ("below 4k", "above 8k")


def test_what_was_not_measured_is_left_out() -> None:
    result = make_launched()
    for row in result["rows"]:
        if row.get("density") == 0.1 and row["tokens"] == 16384:
            del row["total_plain_ms"]
        if row.get("density") == 0.05 and row["tokens"] == 131072:
            row["dense_kernels"] = {}
    graph = {c.density: c for c in curves(result, "llama3-8b", "two")}
    launched = {c.density: c for c in curves(result, "llama3-8b", "two", time="total_plain_ms")}
    assert [tokens for tokens, _ in launched[0.1].points] == [8192, 32768, 131072]
    assert [tokens for tokens, _ in graph[0.1].points] == list(LENGTHS)
    assert [tokens for tokens, _ in graph[0.05].points] == [8192, 16384, 32768]
    assert curves(result, "llama3-8b", "paper") == []


def test_the_first_token_is_that_of_dense_runs_and_of_the_selector() -> None:
    found = first_token(make_prefill()["rows"], "two")
    times = {key: [(row["tokens"], row["ms"]) for row in rows] for key, rows in found.items()}
    assert times == {
        ("sparse", 0.1): [(8192, 300.0), (32768, 800.0)],
        ("dense_eager", None): [(32768, 1400.0)],
        ("dense_compiled", None): [(32768, 1200.0)],
    }


def test_the_default_turns_between_the_last_dense_and_the_first_sparse_prompt() -> None:
    rows = [decision(16384, "sparse"), decision(4096, "dense"), decision(8192, "dense")]
    rows += [decision(32768, "dense", queries=1), decision(2048, "sparse", layers=2)]
    rows += [decision(1024, "sparse", selector="UniSparse(top_k=16)")]
    rows += [decision(1024, "sparse", shape="smollm2")]
    prompts = default_prompts(rows, "llama3-8b")
    assert [row["tokens"] for row in prompts] == [4096, 8192, 16384]
    assert decided(prompts) == (8192, 16384)
    assert decided(default_prompts(rows, "smollm2")) is None
    assert decided([*prompts, decision(65536, "dense")]) is None


def test_lines_and_marks_are_the_curves_and_their_break_even() -> None:
    pytest.importorskip("matplotlib")
    result = make_launched()
    figure = draw([result, make_prefill()], "llama3-8b", "two")
    graph, launched, model = figure.axes
    for axes, time in ((graph, "total_ms"), (launched, "total_plain_ms")):
        found = curves(result, "llama3-8b", "two", time=time)
        lines, marks = drawn(axes, "speed-up"), drawn(axes, "break-even")
        assert lines == {density_name(c.density): list(c.points) for c in found}
        sides = {density_name(c.density): c.break_even for c in found}
        at = {name: [(even.tokens, 1.0)] for name, even in sides.items() if even.side == "at"}
        below = {name: lines[name][0] for name, even in sides.items() if even.side == "below"}
        assert marks == at
        assert arrows(axes) == below
        assert legend(axes) == [f"{name}: {even}" for name, even in sides.items()]
        assert [1.0, 1.0] in [np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()]
    # Break-even is below 8k inside a graph; launches move two into what was measured.
    assert drawn(graph, "break-even") == {}
    assert set(drawn(launched, "break-even")) == {"10%", "30%"}
    assert drawn(model, "seconds") == {
        "dense, eager": [(32768, 1.4)],
        "dense, compiled": [(32768, 1.2)],
        "sparse, 10%": [(8192, 0.3), (32768, 0.8)],
    }
    assert [text.get_text() for text in model.texts] == ["1.50x"]


def test_a_mark_lies_on_the_line_as_it_is_seen() -> None:
    pytest.importorskip("matplotlib")
    _, axes = draw([make_launched()], "llama3-8b", "two").axes
    to_pixels = axes.transData.transform
    lines = drawn(axes, "speed-up")
    for name, [mark] in drawn(axes, "break-even").items():
        following = next(i for i, (_, speedup) in enumerate(lines[name]) if speedup >= 1)
        low, high = to_pixels(lines[name][following - 1 : following + 1])
        x, y = to_pixels(mark)
        part = (x - low[0]) / (high[0] - low[0])
        assert 0 < part < 1
        assert math.isclose(low[1] + part * (high[1] - low[1]), y, abs_tol=0.01)


def test_curves_differ_by_more_than_colour() -> None:
    pytest.importorskip("matplotlib")
    axes = draw([make_launched()], "llama3-8b", "two").axes[0]
    lines = [line for line in axes.get_lines() if str(line.get_gid()).startswith("speed-up")]
    for looks in ([line.get_marker() for line in lines], [line.get_linestyle() for line in lines]):
        assert len(set(looks)) == len(lines) == len(DENSITIES)


def test_panels_of_what_no_file_has_are_left_out() -> None:
    pytest.importorskip("matplotlib")
    assert len(draw([make_result()], "llama3-8b", "two").axes) == 1
    assert len(draw([make_launched()], "llama3-8b", "two").axes) == 2
    [axes, model] = draw([make_result(), make_prefill()], "llama3-8b", "two").axes
    assert axes.get_title() == "attention, inside a CUDA graph"
    assert model.get_title() == "whole model, 3 layers"


def test_the_lengths_of_the_decision_are_marked_beside_launched_calls() -> None:
    pytest.importorskip("matplotlib")
    rows = [decision(8192, "dense"), decision(16384, "sparse")]
    decisions = {"device": "NVIDIA H200", "rows": rows}
    graph, launched = draw([make_launched(), decisions], "llama3-8b", "two").axes
    assert (bands(graph), bands(launched)) == ([], [(8192, 16384)])
    assert drawn(launched, "decided") == {"default, H200": [(16384, 0.8)]}
    assert legend(launched)[-1] == "default, H200: above 16k"


def test_the_committed_files_are_drawn_together() -> None:
    pytest.importorskip("matplotlib")
    _, launched, _ = draw(speed_plots.committed("default"), "llama3-8b", "default").axes
    [(low, high)] = bands(launched)
    assert low < break_even() <= high


def test_files_become_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    paths = [tmp_path / name for name in ("attention-x.json", "prefill-x.json")]
    for path, result in zip(paths, (make_launched(), make_prefill()), strict=True):
        path.write_text(json.dumps(result))
    output = tmp_path / "plots" / "speed.png"
    speed_plots.main([*map(str, paths), "--output", str(output), "--selector", "two"])
    assert output.stat().st_size > 10_000
    assert capsys.readouterr().out == f"plotted {output}\n"


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"gate": {"passed": False}}, [], "the gate did not pass"),
        ({"rows": []}, [], "no file holds a speed-up of two with the heads of llama3-8b"),
        ({}, ["--selector", "paper"], "no file holds a speed-up of paper"),
        ({}, ["--shape", "smollm2"], "with the heads of smollm2"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_reason(
    tmp_path: Path, change: dict[str, Any], options: list[str], reason: str
) -> None:
    pytest.importorskip("matplotlib")
    path, output = tmp_path / "attention-x.json", tmp_path / "speed.png"
    path.write_text(json.dumps(make_result() | change))
    with pytest.raises(SystemExit, match=reason):
        speed_plots.main([str(path), "--output", str(output), "--selector", "two", *options])
    assert not output.exists()


def test_files_of_two_devices_are_not_drawn_together() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="files must be of one device, got a device, another"):
        draw([make_result(), make_prefill() | {"device": "another"}], "llama3-8b", "two")


def test_without_files_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match="no files of attention"):
        speed_plots.main([])


def test_the_page_says_when_the_committed_files_break_even() -> None:
    result = json.loads((FOLDER / SPEED).read_text())
    graph = {c.density: c.break_even for c in curves(result, "llama3-8b", "default")}
    found = curves(result, "llama3-8b", "default", time="total_plain_ms")
    launched = {c.density: c.break_even for c in found}
    assert {even.side for density, even in graph.items() if density is not None} == {"below"}
    text = Path("docs/performance.md").read_text()
    assert launched[0.2].side == launched[0.5].side == "at"
    lengths = [f"{round(launched[density].tokens, -3):.0f}" for density in (0.2, 0.5)]
    assert f"from about {lengths[0]} (20%) to {lengths[1]} tokens (50%)" in text


def test_pages_say_from_where_prompts_run_sparse() -> None:
    about = [f"about {round(break_even(masked=masked), -2)}" for masked in (False, True)]
    for page in ("README.md", "docs/limits.md"):
        assert all(text in Path(page).read_text() for text in about), page
    for page in ("docs/not-faster.md", "docs/index.md"):
        assert about[0] in Path(page).read_text(), page


def test_pages_hold_the_worst_decisions_of_the_file() -> None:
    rows = json.loads((FOLDER / DECISIONS).read_text())["rows"]
    worst = max((row for row in rows if row["decision"] == "sparse"), key=lambda row: row["ratio"])
    assert f"{worst['ratio']:.2f} times" in Path("docs/performance.md").read_text()
    assert f"{1 / worst['ratio']:.2f}x" in Path("README.md").read_text()
