"""What `explain` says of a whole prefill: predicted attention and what the rest took."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unisparse_flex import explain, optimize
from unisparse_flex.passes.decision.call_forecast import CallForecast
from unisparse_flex.reports import AttentionRecord, Explanation

from .models import SELECTOR, WIDTH, Attention, create, embeddings, split_heads

X = embeddings(300)


class Takes(nn.Module):
    """Lets a clock advance by so many seconds."""

    def __init__(self, now: list[float], seconds: float) -> None:
        super().__init__()
        self.now, self.seconds = now, seconds

    def forward(self, x: Tensor) -> Tensor:
        self.now[0] += self.seconds
        return x


class Layer(nn.Module):
    def __init__(self, now: list[float], norm: float, mlp: float) -> None:
        super().__init__()
        self.now = now
        self.norm = Takes(now, norm)
        self.mlp = nn.Sequential(Takes(now, mlp), Takes(now, mlp))

    def forward(self, x: Tensor) -> Tensor:
        heads = split_heads(self.norm(x))
        F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        # Beside an attention call: not told apart from it.
        self.now[0] += 1000
        x = self.mlp(x)
        return x


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found = [0.0]
    monkeypatch.setattr("unisparse_flex.reports.rest_time.time.perf_counter", lambda: found[0])
    return found


def test_the_rest_is_every_module_without_attention_calls(now: list[float]) -> None:
    model = nn.Sequential(Takes(now, 7), Layer(now, 1, 2), nn.Sequential(Takes(now, 3)))
    # A parameter says on which device it runs.
    model.append(nn.LayerNorm(WIDTH))
    assert explain(model, X).rest_ms == 1e3 * (7 + 1 + 2 * 2 + 3)


def test_layers_of_a_stack_count_as_the_median_of_them(now: list[float]) -> None:
    layers = [Layer(now, 1, mlp) for mlp in (50, 2, 2, 2)]
    model = nn.Sequential(nn.LayerNorm(WIDTH), *layers)
    assert explain(model, X).rest_ms == 1e3 * (4 * 1 + 4 * 2 * 2)


def test_what_is_called_once_counts_without_what_its_first_call_waits_for(now: list[float]) -> None:
    class Head(Takes):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            self.seconds = 3
            return x

    model = nn.Sequential(nn.LayerNorm(WIDTH), Layer(now, 1, 2), Head(now, 100)).eval()
    assert explain(model, X).rest_ms == 1e3 * (1 + 2 * 2 + 3)


def test_nothing_is_left_to_time_in_a_model_that_is_attention(now: list[float]) -> None:
    class Only(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            heads = split_heads(x)
            return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)

    explanation = explain(Only(), X)
    assert explanation.calls
    assert (explanation.rest_ms, explanation.prefill_ms) == (None, None)


def test_no_prefill_is_predicted_where_a_module_projects_and_attends_in_one() -> None:
    attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    explanation = explain(optimize(Packed(), SELECTOR, min_length=0), X)
    assert explanation.sparse
    assert explanation.rest_ms is None
    assert "prefill" not in str(explanation)


class Causal(nn.Module):
    """Computes logits as the causal models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = create(Attention), nn.Linear(WIDTH, 64)

    def forward(self, x: Tensor, logits_to_keep: int | Tensor = 0) -> Tensor:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return self.head(self.attention(x)[:, kept])


def test_a_rest_with_the_logits_of_every_position_is_said_to_have_them() -> None:
    said = "with the logits of every position: explain(model, input_ids, logits_to_keep=1)"
    model = optimize(Causal(), SELECTOR, min_length=0)

    def table(**given: Any) -> str:
        return " ".join(explain(model, X, **given).table().split())

    assert said in table()
    assert said in table(logits_to_keep=0)
    assert "whole prefill" in table(logits_to_keep=1)
    assert said not in table(logits_to_keep=1)
    assert said not in table(logits_to_keep=torch.tensor([299]))
    assert said not in explain(optimize(create(Attention), SELECTOR, min_length=0), X).table()


def test_a_prefill_is_predicted_of_a_real_run() -> None:
    explanation = explain(optimize(create(Attention), SELECTOR, min_length=0), X)
    assert explanation.rest_ms is not None
    assert explanation.rest_ms > 0
    assert explanation.prefill_ms == tuple(
        ms + explanation.rest_ms for ms in explanation.predicted_ms
    )


def record(prediction: CallForecast | None) -> AttentionRecord:
    sizes: dict[str, Any] = {"q_len": 8192, "kv_len": 8192, "density": 0.3}
    return AttentionRecord(layer="layers.0", decision="sparse", prediction=prediction, **sizes)


def test_the_verdict_says_what_the_whole_prefill_gains() -> None:
    faster = record(
        CallForecast(dense_ms=10.0, sparse_ms=4.0, density=0.3, break_even=4096, note="")
    )
    explanation = Explanation((faster, faster), rest_ms=10.0)
    assert explanation.verdict == (
        "2 of 2 calls sparse, 30% of blocks, attention predicted 2.5x as fast, the whole prefill "
        "1.67x as fast"
    )
    # Of one call nothing is known, so of the whole neither.
    assert Explanation((faster, record(None)), rest_ms=10.0).prefill_ms is None
    assert "prefill" not in Explanation((faster, record(None)), rest_ms=10.0).verdict
    assert Explanation((), rest_ms=10.0).prefill_ms is None
    # Decoding is no prefill.
    assert Explanation((replace(faster, q_len=1),), rest_ms=10.0).prefill_ms is None
