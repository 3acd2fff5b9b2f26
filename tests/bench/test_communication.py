"""The simulated study and its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import tables
from bench.communication import measure as communication
from unisparse_flex.distributed import SequenceLayout

ROOT = Path(__file__).parents[2]


def test_the_page_holds_the_tables_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/evidence/distributed-tables.md").read_text()
    assert "SIMULATED" in page
    assert tables.fill(page) == page


def test_the_file_is_what_the_model_says_today() -> None:
    result = json.loads((ROOT / communication.OUTPUT).read_text())
    selector = communication.SETTINGS["two"]
    row = next(
        r
        for r in result["rows"]
        if (r["selector"], r["tokens"], r["ranks"], r["density"], r["needed"])
        == ("two", 2**20, 8, 0.1, 0.5)
    )
    work = communication.predict(2**20, selector, 0.1)
    found = communication.simulate_one(2**20, selector, 8, 0.5, work)
    assert found == {name: pytest.approx(row[name]) for name in found}
    # 8 key heads of 128 numbers in 2 bytes: keys of the 7 others, and half of their values.
    keys = 7 / 8 * 8 * 2**20 * 128 * 2
    assert row["dense_bytes"] == 2 * keys
    assert row["sparse_bytes"] == keys + keys / 2 + 7 * 8 * 8192


def test_needs_are_those_of_other_ranks_blocks() -> None:
    layout = SequenceLayout(pieces=(8 * 16,), ranks=2, block_size=16)
    # Rank 0 holds blocks 0, 1, 6 and 7, rank 1 those between.
    kept = torch.eye(8, dtype=torch.bool)[None].clone()
    assert communication.needed_share(kept, layout) == 0.0
    kept[0, 7, 2] = kept[0, 3, 0] = kept[0, 2, 0] = True
    assert communication.needed_share(kept, layout) == pytest.approx((1 / 4 + 1 / 4) / 2)
