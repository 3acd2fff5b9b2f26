from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from bench import cost_decision, markdown, prefill, registry
from bench import tables as command
from bench.attention import tables
from bench.record import FOLDER
from bench.registry import BENCHMARKS, benchmark_of
from tests.bench.results import make_result

ROOT = Path(__file__).parents[2]


def cells(table: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]


def test_a_speedup_is_that_of_the_fastest_backend() -> None:
    head, _, *lines = cells(tables.speedup_table(make_result(), "llama3-8b", "two"))
    assert head == ["tokens", "5%", "10%", "30%"]
    assert [line[0] for line in lines] == ["8192", "16384", "32768", "131072"]
    # 32768: dense 64 ms; 1 ms of selection and 8 ms of attention at 10 %.
    assert lines[2][2] == "7.11x (3.56x)"


def test_selections_share_is_that_of_the_two_parts() -> None:
    head, _, *lines = cells(tables.selection_table(make_result(), "llama3-8b"))
    row = dict(zip(head, lines[7], strict=True))
    assert (row["tokens"], row["density"], row["share"]) == ("32768", "10.0%", "11%")
    assert (row["selection ms"], row["attention ms"], row["total ms"]) == ("1", "8", "9")
    assert (row["extra MiB"], row["backend"]) == ("3", "triton")


def test_the_dense_table_holds_every_kernel() -> None:
    head, _, *lines = cells(tables.dense_table(make_result(), "llama3-8b"))
    assert head == ["tokens", "sdpa", "sdpa_cudnn"]
    assert lines[3] == ["131072", "1024", "512"]


def test_a_backend_is_compared_with_its_own_dense_kernel() -> None:
    result = make_result()
    for row in result["rows"]:
        if "dense_kernels" in row:
            row["dense_kernels"] = row["dense_kernels"] | {"flex": 2 * row["dense_ms"]}
            row["total_plain_ms"] = 12.0
    head, _, *lines = cells(tables.backends_table(result, "llama3-8b"))
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    # No dense time of the other backend is known.
    assert {row["backend"] for row in rows} == {"triton"}
    [row] = [row for row in rows if (row["tokens"], row["density"]) == ("32768", "10%")]
    # Dense by its own kernel 128 ms, a tenth of that is 12.8 ms, and 8 ms were measured.
    assert row["of its ideal"] == "1.60"
    assert (row["total ms"], row["launched from Python ms"], row["SDPA ms"]) == ("9", "12", "64")


def test_the_command_can_be_run_as_it_is_printed() -> None:
    result = make_result() | {"command": ["python", "-m", "bench.attention", "--compiled", ""]}
    assert "`python -m bench.attention --compiled ''`" in tables.describe(result, "x.json")


def test_what_was_skipped_is_listed() -> None:
    assert "| llama3-8b | 4096 | two |  | skipped | out of reach |" in tables.errors_table(
        make_result()
    )


def test_a_failed_gate_is_said_first() -> None:
    result = make_result() | {"gate": {"passed": False}}
    assert "THE GATE DID NOT PASS" in tables.describe(result, "x.json")


def test_prefill_is_compared_with_dense() -> None:
    rows = [
        {"variant": "dense_eager", "tokens": 8192, "ms": 300.0, "speedup": 1.0},
        {"variant": "sparse", "tokens": 8192, "ms": 150.0, "speedup": 2.0, "peak_bytes": 2**31},
    ]
    _, _, *lines = cells(prefill.prefill_table({"rows": rows}))
    assert lines[1] == ["8192", "sparse", "", "150", "2.00x", "2.0"]


def test_a_file_becomes_tables_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "attention-x.json"
    path.write_text(json.dumps(make_result()))
    command.main([str(path), "--plots", str(tmp_path / "plots")])
    assert "| 32768 |" in capsys.readouterr().out
    assert (tmp_path / "plots" / "attention-llama3-8b.png").stat().st_size > 10000


def test_without_files_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match="no files of attention"):
        command.main([])


def test_a_decision_is_shown_with_its_ratio() -> None:
    row = {"layers": 0, "tokens": 1024, "queries": 1, "selector": "UniSparse(c_q=8, top_k=16)"}
    row |= {"decision": "dense", "density": None, "dense_ms": 2.0, "optimized_ms": 2.1}
    failed = {"layers": 2, "tokens": 2048, "queries": 2048, "selector": "UniSparse(top_p=0.95)"}
    result = make_result() | {"rows": [row | {"ratio": 1.05}, failed]}
    head, _, *lines = cells(cost_decision.decision_table(result))
    assert len(head) == len(lines[0])
    assert lines[0] == ["bare call", "1024", "1", "top_k=16", "dense", "", "2", "2.1", "1.05"]
    assert lines[1] == ["2", "2048", "2048", "top_p=0.95", "", "", "", "", ""]
    assert "left alone ms" in cost_decision.describe(result, "cost-decision.json")


def test_of_files_made_one_the_first_to_have_a_row_counts() -> None:
    first, second = make_result(), make_result()
    second["command"] = ["python", "-m", "bench.attention", "--shapes", "smollm2"]
    second["stopped"] = "after 1 seconds"
    first["rows"] = [row for row in first["rows"] if row.get("tokens") != 16384]
    for row in second["rows"]:
        row["dense_ms"] = 7.0
    joined = tables.join([first, second])
    times = {r["tokens"]: r["dense_ms"] for r in joined["rows"] if r["stage"] == "dense"}
    assert times == {8192: 4.0, 32768: 64.0, 131072: 1024.0, 16384: 7.0}
    text = tables.describe(joined, "two files")
    assert "`python -m bench.attention`\n\n`python -m bench.attention --shapes smollm2`" in text
    assert "Stopped: after 1 seconds." in text
    assert tables.join([first]) == first


def test_files_of_different_devices_do_not_become_one() -> None:
    with pytest.raises(ValueError, match=r"files must be of one device .* got a device"):
        tables.join([make_result(), make_result() | {"device": "another"}])


def test_a_gate_that_failed_in_one_file_failed_in_all() -> None:
    failed = make_result()
    failed["rows"][0] |= {"shape": "wide-256", "passed": False}
    assert "THE GATE DID NOT PASS" in tables.describe(tables.join([make_result(), failed]), "two")


def test_a_page_without_its_tables_gets_them_back() -> None:
    page = (ROOT / "docs/evidence/performance-tables.md").read_text()
    bare = re.sub(markdown.SECTION % command.SECTIONS, r"\g<start>\n\g<end>", page, flags=re.DOTALL)
    assert "| 131072 |" not in bare
    assert command.fill(bare) == page


def test_cells_are_written_by_the_format_of_their_column() -> None:
    columns: dict[str, markdown.Format] = {"a": "{}", "b": "{:.1%}", "c": markdown.milliseconds}
    table = markdown.table(columns, [["x", 0.25, 123.4], [None, None, 1.234]])
    assert cells(table)[2:] == [["x", "25.0%", "123"], ["", "", "1.23"]]
    assert markdown.table(columns, []) == ""


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_every_result_belongs_to_one_benchmark(path: Path) -> None:
    [benchmark] = [each for each in BENCHMARKS if fnmatch(path.name, each.files)]
    result = json.loads(path.read_text())
    assert benchmark_of(result, path.name) is benchmark
    assert result.get("benchmark", benchmark.name) == benchmark.name
    if benchmark.name == "commands":
        assert result["command"][:2] == ["unisparse-flex", result["kind"]]
        return
    if benchmark.name == "demo":
        assert result["command"][:2] == ["unisparse-flex", "demo"]
        return
    assert result["command"][:2] == ["python", "-m"]
    module = result["command"][2]
    assert module == benchmark.module or module.startswith(f"{benchmark.module}.")


def test_a_file_is_told_by_the_benchmark_that_it_names_before_its_own_name() -> None:
    assert benchmark_of({"benchmark": "video"}, "prefill-x.json").name == "video"
    with pytest.raises(
        ValueError, match=r"rows\.json must name its benchmark, or be called as one"
    ):
        benchmark_of({}, "rows.json")


def test_two_files_of_one_name_are_both_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[Any]
) -> None:
    paths = [tmp_path / folder / "attention-x.json" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps(make_result()))
    command.main([*map(str, paths), "--no-plots"])
    printed = capsys.readouterr().out
    assert printed.startswith("attention-x.json: a device")
    assert f"\n{paths[1]}: a device" in printed


def test_files_of_several_benchmarks_make_no_table() -> None:
    with pytest.raises(ValueError, match="files must be of one benchmark, got a, b"):
        registry.describe({"a": {"benchmark": "video"}, "b": {"benchmark": "prefill"}})
    with pytest.raises(ValueError, match="nothing makes tables of a"):
        registry.describe({"a": {"benchmark": "cost_rates"}})
