"""The benchmark of several devices, in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.distributed import describe, main

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_ranks_leave_a_record_of_every_row(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    command = [sys.executable, "-m", "bench.distributed", "--small", "--ranks", "2"]
    command += ["--backend", "gloo", "--parts", "context_parallel", "--context-tokens", "1100"]
    done = subprocess.run(
        [*command, "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    rows = {(row["variant"], row["ranks"]): row for row in record["rows"]}
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
        ],
    }
    text = describe(result, "file.json")
    assert "2 x Card, nccl, torch 2.11.0" in text
    assert "| sparse 10% | 2 | 4096 | 10 | 4.00x | 90% | 2 |  |" in text
    assert "| dense | 2 | 4096 | 50 |  |  |  | 1 |" in text
    assert "0 of 64 blocks differ; relative error of the output 1.0e-03." in text
    assert "dense_other on 2: E: no" in text


def test_more_ranks_than_devices_are_refused() -> None:
    with pytest.raises(SystemExit, match=r"no CUDA device here|--ranks must be at most"):
        main(["--ranks", "64", "--backend", "nccl"])
