"""Attention on real queries and keys: how heads are dealt, rows, and all layers as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import real_prompts
from bench.calls import Case, Heads
from bench.real_prompts import describe, fill, measure_layers, whole_models
from unisparse_flex import UniSparse

pytestmark = pytest.mark.filterwarnings("ignore:sparse attention runs uncompiled")


def _layers(count: int, tokens: int = 256) -> list[real_prompts.Inputs]:
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, 64, generator=generator)

    return [(draw(9), draw(3), draw(3)) for _ in range(count)]


def test_filled_heads_attend_as_their_own() -> None:
    layers = _layers(3)
    heads = Heads(query=16, key=4, head_dim=128)
    calls = fill([(q * 2**0.5, k, v) for q, k, v in layers], heads)
    assert [q.shape[1] for q, _, _ in calls] == [16, 16]
    # Of nine key heads the calls hold eight, each once.
    kept = torch.cat([key[0, :, 0, :64] for _, key, _ in calls])
    every = torch.cat([key[0, :, 0] for _, key, _ in layers])
    assert [int((every == row).all(1).sum()) for row in kept] == [1] * 8
    own = {
        tuple(v[0, head // 3, 0, :2].tolist()): F.scaled_dot_product_attention(
            q[:, head : head + 1], k[:, head // 3, None], v[:, head // 3, None], is_causal=True
        )
        for q, k, v in layers
        for head in range(0, 9, 3)
    }
    for query, key, value in calls:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        for head in range(4):
            expected = own[tuple(value[0, head, 0, :2].tolist())]
            for of_group in (0, 3):
                torch.testing.assert_close(output[:, 4 * head + of_group, :, :64], expected[:, 0])


def test_too_few_heads_fill_no_call() -> None:
    with pytest.raises(ValueError, match="layers must have 8 key heads in all, got 6"):
        fill(_layers(2), Heads(query=32, key=8, head_dim=128))


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, slow_kernels: None) -> list[dict[str, Any]]:
    """Of two layers, with the reference in place of kernels and one clock for all."""

    def select(case: Case, selector: UniSparse) -> Any:
        return selector.select(*case.inputs[:2], is_causal=True).block_lists()

    def clock(function: Any) -> float:
        function()
        return 2.0

    def attend(case: Case, backend: str, lists: Any) -> torch.Tensor:
        query, key, value = case.inputs
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    monkeypatch.setattr(Case, "select", select)
    monkeypatch.setattr(Case, "attend", attend)
    monkeypatch.setattr(real_prompts, "graph_ms", clock)
    case = Case("smollm2", 640, "cpu", torch.float32)
    head = {"model": "smollm2", "heads_of": "smollm2", "text": "prose", "tokens": 640}
    return list(measure_layers(case, _layers(2, 640), "triton", head, ("balanced", "fast")))


def test_every_layer_and_quality_has_a_row(rows: list[dict[str, Any]]) -> None:
    assert [(row["layer"], row["quality"]) for row in rows] == [
        (0, "balanced"),
        (0, "fast"),
        (1, "balanced"),
        (1, "fast"),
    ]
    for row in rows:
        assert (row["total_ms"], row["speedup"], row["relative_error"]) == (2.0, 1.0, 0.0)
        assert 0 < row["density"] <= 1
    # The decision is one of shapes.
    assert [row.get("decision", {}).get("decision") for row in rows] == ["dense"] * 2 + [None] * 2
    # cuDNN is not there: the row that would have timed it says so.
    assert [set(row.get("errors", ())) for row in rows] == [{"sdpa_cudnn"}, set(), set(), set()]
    assert set(rows[1]["dense_kernels"]) == {"sdpa", "sdpa_flash", "flex"}


def test_layers_are_summed(rows: list[dict[str, Any]]) -> None:
    rows[0] |= {"total_ms": 1.0, "speedup": 2.0, "density": 0.25}
    rows[2] |= {"total_ms": 4.0, "speedup": 0.5, "density": 0.75}
    balanced, fast = whole_models({"rows": rows})
    assert (balanced["layers"], balanced["density"], balanced["densities"]) == (
        2,
        0.5,
        (0.25, 0.75),
    )
    assert (balanced["speedup"], balanced["speedups"]) == (4.0 / 5.0, (0.5, 2.0))
    assert (fast["quality"], fast["speedup"]) == ("fast", 1.0)
    result = {"device": "a GPU", "versions": {}, "command": ["run"], "rows": rows}
    assert "| smollm2 | prose | 640 | balanced | 2 | dense | 50% | 25%, 75% | 4 |" in describe(
        result, "it"
    )
