"""Rules and granularities that were tried are what they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.quality import defaults
from bench.quality.trials import (
    GRANULARITIES,
    RULES,
    TRIALS,
    EvenShare,
    MassBudget,
    Trial,
    from_moments,
    power_mean_scores,
)
from tests.api.models import qkv
from unisparse_flex import UniSparse
from unisparse_flex.block_masks import BlockGeometry, Pooled, Sampled
from unisparse_flex.block_masks.selection import Threshold
from unisparse_flex.selectors import DEFAULT_SELECTOR, Oracle

SHARES = st.lists(st.integers(0, 16), min_size=1, max_size=8)


def as_row(values: list[float]) -> torch.Tensor:
    return torch.tensor(values)[None, None, None]


@settings(max_examples=200)
@given(SHARES, st.data(), st.integers(1, 40), st.sampled_from([0.0, 1.0, 2.0]))
def test_a_mass_budget_keeps_what_the_definition_keeps(
    counts: list[int], data: st.DataObject, least: int, power: float
) -> None:
    total = max(sum(counts), 1)
    scores = [count / total for count in counts]
    forced = [data.draw(st.booleans()) for _ in counts]
    visible = [data.draw(st.booleans()) for _ in counts]
    rule = MassBudget(least=least / 200 + 1e-6, power=power)
    flags = (torch.tensor(part)[None, None, None] for part in (forced, visible))
    chosen = rule.select(as_row(scores).double(), *flags)[0, 0, 0].tolist()
    held = sum(s for s, f, v in zip(scores, forced, visible, strict=True) if f and v)
    free = [s for s, f, v in zip(scores, forced, visible, strict=True) if v and not f]
    for share, is_forced, is_visible, kept in zip(scores, forced, visible, chosen, strict=True):
        rest = max(1 - held - sum(other for other in free if other > share), 0.0)
        product = share * rest**power
        if abs(product - rule.least) > 1e-9:
            assert kept == (is_visible and (is_forced or (product >= rule.least and share > 0)))


def test_an_even_share_depends_on_the_blocks_of_the_row() -> None:
    scores = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0.8, 0.12, 0.08]])[None, None]
    visible = scores > 0
    forced = torch.zeros_like(visible)
    rule = EvenShare(part=0.3, top_p=0.5)
    # 0.3 / 2 is more than 0.1; 0.3 / 3 is between 0.08 and 0.12.
    expected = [[True, False, False], [True, False, False], [True, True, False]]
    assert rule.select(scores, forced, visible)[0, 0].tolist() == expected
    whole = EvenShare(part=0.3, top_p=0.95).select(scores, forced, visible)
    assert whole[0, 0, 2].tolist() == [True, True, True]


def test_a_mass_budget_of_power_zero_is_a_threshold() -> None:
    scores = torch.rand(2, 3, 5, 5).softmax(-1)
    everything, nothing = torch.ones(5, 5, dtype=torch.bool), torch.zeros(5, 5, dtype=torch.bool)
    flags = nothing, everything
    budget = MassBudget(least=0.2, power=0.0).select(scores, *flags)
    assert budget.equal(Threshold(threshold=0.2).select(scores, *flags))
    assert 0 < budget.sum() < budget.numel()


@pytest.mark.parametrize("name", ["q8k8", "q16k16s4"])
def test_a_trial_of_shipped_parts_selects_as_they_do(name: str) -> None:
    query, key, _ = qkv(500)
    fields: dict[str, Any] = {n: min(v, 32) for n, v in GRANULARITIES[name].items()}
    trial = Trial(block_size=32, rule="top_p", value=0.6, **fields)
    shipped = UniSparse.paper(block_size=32, top_p=0.6, **fields)
    kept = trial.select(query, key, is_causal=True).keep
    assert kept.equal(shipped.select(query, key, is_causal=True).keep)


def test_the_trial_of_every_row_is_the_oracle() -> None:
    query, key, _ = qkv(500)
    forced_blocks = {"sink_blocks": 0, "last_query_blocks": 0}
    trial = Trial(block_size=32, sampled_queries=32, rule="top_p", value=0.6, **forced_blocks)
    oracle = Oracle(block_size=32, top_p=0.6)
    kept = trial.select(query, key, is_causal=True).keep
    assert kept.equal(oracle.select(query, key, is_causal=True).keep)


@pytest.mark.parametrize("offset", [None, 0])
@pytest.mark.parametrize("power", [2, 4])
def test_a_power_mean_is_one_over_rows_and_granularities(power: int, offset: int | None) -> None:
    size, length = 16, 75
    query, key = torch.randn(2, 4, length, 8).double(), torch.randn(2, 2, length, 8).double()
    logits = query @ key.repeat_interleave(2, dim=1).mT * 0.7
    hidden = torch.full((length, length), offset is not None).triu(1)
    blocks = logits.masked_fill(hidden, -torch.inf).softmax(-1).split(size, dim=3)
    shares = torch.stack([block.sum(-1) for block in blocks], dim=-1)
    means = [rows.pow(power).mean(2) ** (1 / power) for rows in shares.split(size, dim=2)]
    expected = torch.stack(means, dim=2)
    geometry = BlockGeometry(q_len=length, kv_len=length, block_size=size, causal_offset=offset)
    # Either one is exact, so that both together are.
    exact: list[Pooled | Sampled] = [Sampled(queries=size), Pooled(q=1, k=1)]
    for granularities in (exact[:1], exact[1:], exact):
        found = power_mean_scores(
            query, key, geometry=geometry, granularities=granularities, scale=0.7, power=power
        )
        torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True))


def test_power_means_of_nothing_and_of_what_is_not_a_number_stay() -> None:
    moments = torch.tensor([[[[0.0, 0.0], [float("nan"), 0.0], [0.09, 0.01]]]])
    zero, unknown, shares = from_moments(moments, 2)[0, 0]
    assert zero.equal(torch.zeros(2))
    assert unknown.isnan().all()
    torch.testing.assert_close(shares, torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_keeps_more_from_value_to_value(rule: str) -> None:
    query, key, _ = qkv(700)
    sweep = TRIALS[f"trial-q8k8-{rule}"](32)
    kept = [selector.select(query, key, is_causal=True).density() for selector in sweep]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1]


def test_the_default_is_a_point_of_its_sweep() -> None:
    assert DEFAULT_SELECTOR in defaults(DEFAULT_SELECTOR.block_size)
    assert replace(DEFAULT_SELECTOR, block_size=64, c_k=64) in defaults(64)
