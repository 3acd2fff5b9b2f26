"""The benchmark of generated tokens: what a row holds, and its table."""

from __future__ import annotations

from typing import Any

import pytest

from bench import generation, generation_gpu
from unisparse_flex.integrations import transformers_decode, transformers_decode_device
from unisparse_flex.integrations.transformers import unregister


def test_each_cache_is_timed_beside_the_static_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_decode, "DEVICES", ("cpu",))
    monkeypatch.setattr(transformers_decode_device, "FEW_BYTES", 0)
    monkeypatch.setattr(generation_gpu, "UNTIMED", 2)
    try:
        model = generation_gpu.create_model(1, "cpu", small=True)
        rows = list(generation_gpu.measure(model, ((2, 2000), (1, 1000)), tokens=6))
    finally:
        unregister("unisparse")
    assert [(row["batch"], row["cache"]) for row in rows] == [
        (2, "static"),
        (2, "DecodeSelector(share=0.1)"),
        (2, "DecodeSelector(share=0.999)"),
        (1, "static"),
        (1, "DecodeSelector(share=0.1)"),
    ]
    for row in rows:
        assert "errors" not in row
        assert len(row["ms"]) == 3
        assert row["tokens_per_second"] > 0
    # The fewest keys that are kept are 512 of 2000.
    assert rows[1]["density"] == pytest.approx(0.25, abs=0.02)
    assert rows[2]["density"] == 1.0


def test_a_table_compares_with_the_static_cache_of_the_same_shape() -> None:
    sizes = {"tokens": 8, "tokens_per_second": 100.0}
    rows: list[dict[str, Any]] = [
        {"batch": 1, "cache": "static", "density": None, "ms": [4.0], **sizes},
        {"batch": 1, "cache": "sparse", "density": 0.1, "ms": [1.0, 2.0, 9.0], **sizes},
        {"batch": 2, "cache": "sparse", "density": 0.1, "ms": [1.0], **sizes},
        {"batch": 2, "cache": "static", "errors": {"generate": "lost"}, "tokens": 8},
    ]
    result = {
        "model": "M",
        "weights": "random",
        "compiled": True,
        "dtype": "bfloat16",
        "device": "GPU",
        "command": ["python"],
        "rows": rows,
    }
    table = generation.describe(result, "file.json")
    assert "random weights, densities given, compiled by generate" in table
    assert "| 1 | 8 | `sparse` | 10% | 2.00 | 100 | 2.00 |" in table
    assert "| 2 | 8 | `sparse` | 10% | 1.00 | 100 |  |" in table


def test_shapes_are_read_from_text() -> None:
    assert generation.shapes("1x131072,16x32768") == ((1, 131072), (16, 32768))
