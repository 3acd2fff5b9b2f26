"""The benchmark of several devices, in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_more_ranks_than_devices_are_refused() -> None:
    from bench.distributed import main

    with pytest.raises(SystemExit, match=r"no CUDA device here|--ranks must be at most"):
        main(["--ranks", "64", "--backend", "nccl"])
