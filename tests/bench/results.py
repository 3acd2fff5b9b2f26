"""A made-up result of bench.attention, with numbers that are easy to divide."""

from __future__ import annotations

from typing import Any

LENGTHS = (8192, 16384, 32768, 131072)
DENSITIES = (0.05, 0.1, 0.3)


def make_result() -> dict[str, Any]:
    rows: list[dict[str, Any]] = [{"stage": "gate", "shape": "llama3-8b", "passed": True}]
    for tokens in LENGTHS:
        dense_ms = (tokens / 4096) ** 2
        kernels = {"sdpa": dense_ms, "sdpa_cudnn": dense_ms / 2}
        dense = {"dense_ms": dense_ms, "dense_kernel": "sdpa_cudnn", "dense_kernels": kernels}
        place = {"shape": "llama3-8b", "tokens": tokens}
        rows.append({"stage": "dense", **place, **dense})
        for density in DENSITIES:
            selection_ms, attention_ms = tokens / 32768, density * dense_ms * 1.25
            total_ms = selection_ms + attention_ms
            row = {
                "stage": "sparse",
                **place,
                **dense,
                "selector": "two",
                "density": density,
                "density_measured": density,
                "selection_ms": selection_ms,
                "selection_stages_ms": {"pool": 0.01, "score": 0.2, "select": 0.1, "other": 0.0},
                "backend": "triton",
                "attention_ms": attention_ms,
                "total_ms": total_ms,
                "speedup": dense_ms / total_ms,
                "speedup_best": dense_ms / 2 / total_ms,
                "extra_memory_bytes": 3 * 2**20,
            }
            slower = {"total_ms": 2 * total_ms, "speedup": 0.1, "backend": "flash"}
            rows += [row | slower, row]
    rows.append(
        {
            "stage": "sparse",
            "shape": "llama3-8b",
            "tokens": 4096,
            "selector": "two",
            "density": 0.05,
            "skipped": "out of reach",
        }
    )
    return {
        "schema": 1,
        "device": "a device",
        "versions": {"torch": "2.0"},
        "command": ["python", "-m", "bench.attention"],
        "gate": {"passed": True},
        "rows": rows,
    }
