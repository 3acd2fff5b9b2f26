"""`bench.other_gpus`: the file holds what the cost model predicts, and says that it does."""

from __future__ import annotations

import json

import pytest

from bench import other_gpus
from bench.record import FOLDER
from unisparse_flex.passes.decision import PUBLISHED

FILE = FOLDER / "other-gpus-simulated.json"


def test_the_file_is_what_the_cost_model_predicts() -> None:
    written = json.loads(FILE.read_text())
    assert written["simulated"] is True
    rows = [row for facts in PUBLISHED for row in other_gpus.predict(facts)]
    assert len(written["rows"]) == len(rows)
    for found, row in zip(written["rows"], rows, strict=True):
        assert found == {
            name: pytest.approx(value) if isinstance(value, float) else value
            for name, value in row.items()
        }


def test_its_table_says_that_nothing_was_measured() -> None:
    table = other_gpus.describe(json.loads(FILE.read_text()), FILE.name)
    assert "PREDICTED, not measured" in table
    assert all(facts.name in table for facts in PUBLISHED)
