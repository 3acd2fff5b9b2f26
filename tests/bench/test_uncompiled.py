"""The benchmark of uncompiled models: what it times, and its table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import uncompiled
from tests.models.families import BY_NAME
from unisparse_flex.evaluation import LoadedModel
from unisparse_flex.optimization import is_optimized
from unisparse_flex.passes import observe_calls


def test_a_row_holds_both_times_and_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BY_NAME["Llama"].create()
    ids = torch.randint(0, 50, (1, 300))
    loaded = LoadedModel(
        model=model, tokenizer=None, device=torch.device("cpu"), dtype=torch.float32
    )
    asked: list[int] = []

    def encode(_: Any, text: str, *, tokens: int, seed: int) -> torch.Tensor:
        asked.append(tokens)
        return ids

    monkeypatch.setattr(uncompiled, "encode_excerpt", encode)
    with observe_calls(lambda *_: None):
        rows = list(uncompiled.measure(loaded, (300, 200), repeats=2))
    assert asked == [200, 300]
    assert [row["tokens"] for row in rows] == [200, 300]
    for row in rows:
        assert row["sparse_calls"] == 2
        assert 0 < row["density"] <= 1
        assert row["dense_ms"] > 0
        assert row["sparse_ms"] > 0
        assert [len(times) for times in row["times_ms"]] == [2, 2]
    assert not is_optimized(model)


def test_the_table_says_how_much_longer() -> None:
    result = {
        "model": "M",
        "weights": "real",
        "dtype": "float32",
        "device": "CPU",
        "command": ["python", "-m", "bench.uncompiled"],
        "rows": [{"tokens": 1024, "density": 0.5, "dense_ms": 2000.0, "sparse_ms": 5000.0}],
    }
    text = uncompiled.describe(result, "uncompiled-cpu.json")
    assert "| 1024 | 0.500 | 2.0 | 5.0 | 2.5x |" in text
