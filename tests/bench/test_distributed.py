"""The benchmark of several devices, in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.distributed import describe
from bench.distributed.measure import main
from bench.distributed.ranks import Rank, start_ranks

ROOT = Path(__file__).parents[2]


def measure(parts: str, folder: Path) -> list[dict[str, Any]]:
    """The rows of two ranks on the CPU."""
    output = folder / "rows.json"
    command = [sys.executable, "-m", "bench.distributed", "--small", "--ranks", "2"]
    command += ["--backend", "gloo", "--parts", parts, "--context-tokens", "1100"]
    done = subprocess.run(
        [*command, "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(output.read_text())["rows"]
    return rows


@pytest.mark.slow
def test_two_ranks_leave_a_record_of_every_row(tmp_path: Path) -> None:
    rows = {(row["variant"], row["ranks"]): row for row in measure("context_parallel", tmp_path)}
    assert list(rows) == [
        ("selection", 2),
        *(("sparse", 1), ("dense", 1), ("sparse", 2), ("dense", 2), ("dense_ring", 2)),
    ]
    assert rows["selection", 2]["differing_blocks"] == 0
    assert rows["selection", 2]["output_relative_error"] < 1e-5
    assert rows["sparse", 2]["bytes_received_per_rank"] > 0
    # PyTorch has no ring on the CPU: its error is in the row, and the others are there.
    assert "errors" in rows["dense_ring", 2]
    assert all(rows[key]["ms"] > 0 for key in rows if key[0] in ("sparse", "dense"))


@pytest.mark.slow
def test_a_model_over_shared_tokens_is_compared_and_timed(tmp_path: Path) -> None:
    logits, sparse, dense = measure("context_model", tmp_path)
    assert logits["tokens"] == 1100
    assert logits["sparse_logits_relative_error"] < 1e-5
    assert logits["dense_logits_relative_error"] < 1e-5
    assert (sparse["variant"], dense["variant"]) == ("sparse", "dense")
    assert dense["sparse_speedup_over_this"] == dense["ms"] / sparse["ms"]
    # Both are all of the layers, and exchange keys and values in each.
    for row in (sparse, dense):
        assert row["layers"] == 2
        assert row["bytes_received_per_rank"] > 2 * 2 * 1100 / 2 * 2 * 16 * 4


def fail_alone(rank: Rank, folder: str) -> None:
    """Rank 1 fails while it is timed; then all meet again."""

    def function() -> None:
        if rank.index == 1:
            raise ValueError("one alone")

    try:
        rank.seconds(function)
    except (ValueError, RuntimeError) as error:
        said = f"{type(error).__name__}: {error}"
    total = rank.total(rank.index + 1)
    (Path(folder) / str(rank.index)).write_text(f"{said}, {total:g}")


def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    assert start_ranks(3, "gloo", fail_alone, str(tmp_path), seconds=100)
    said = [(tmp_path / str(index)).read_text() for index in range(3)]
    other = "RuntimeError: rank 1 failed, 6"
    assert said == [other, "ValueError: one alone, 6", other]


def test_tables_name_the_best_dense_and_what_failed() -> None:
    common = {"part": "context_parallel", "ranks": 2, "tokens": 4096}
    result = {
        "device": "Card",
        "ranks": 2,
        "backend": "nccl",
        "versions": {"torch": "2.11.0"},
        "command": ["python", "-m", "bench.distributed"],
        "statistic": "one call",
        "rows": [
            {**common, "variant": "selection", "compared_blocks": 64, "differing_blocks": 0}
            | {"output_relative_error": 0.001},
            {**common, "variant": "sparse", "ms": 10.0, "density_expected": 0.1}
            | {"scaling_efficiency": 0.9, "bytes_received_per_rank": 2000000},
            {**common, "variant": "dense", "ms": 50.0, "peak_bytes": 2**30},
            {**common, "variant": "dense_ring", "ms": 40.0},
            {**common, "variant": "dense_other", "errors": {"attention": "E: no"}},
            {**common, "part": "context_model", "variant": "logits"}
            | {"sparse_logits_relative_error": 0.002},
        ],
    }
    text = describe(result, "file.json")
    assert "2 x Card, nccl, torch 2.11.0" in text
    assert "| sparse 10% | 2 | 4096 | 10 | 4.00x | 90% | 2 |  |" in text
    assert "| dense | 2 | 4096 | 50 |  |  |  | 1 |" in text
    assert "0 of 64 blocks differ; relative error of the output 1.0e-03." in text
    assert "dense_other on 2: E: no" in text
    assert "logits against one device at 4096 tokens: sparse 2.0e-03." in text


def test_more_ranks_than_devices_are_refused() -> None:
    with pytest.raises(SystemExit, match=r"no CUDA device here|--ranks must be at most"):
        main(["--ranks", "64", "--backend", "nccl"])
