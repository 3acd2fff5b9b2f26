"""Units that stay because the end of a prompt looked at them."""

from __future__ import annotations

from math import ceil, floor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.block_masks.decoding import create_decoding
from unisparse_flex.block_masks.pages import (
    DecodeSelector,
    estimate_masses,
    keep_units,
    pin_prompt,
    pinned,
)

UNIT, HEADS, KV_HEADS, WIDTH, SCALE = 16, 4, 2, 8, 0.4


def draw(length: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(rows, HEADS, WIDTH, generator=generator) * 3
    key = torch.randn(KV_HEADS, -(-length // UNIT) * UNIT, WIDTH, generator=generator)
    return query, key


def weigh(query: Tensor, key: Tensor, length: int, head: int, unit: int) -> float:
    """What a unit weighs for a key head, key by key in float64."""
    most = 0.0
    for row in range(query.shape[0]):
        for own in range(HEADS // KV_HEADS):
            seen = key[head, : length - query.shape[0] + row + 1].double()
            logits = seen @ query[row, head * (HEADS // KV_HEADS) + own].double() * SCALE
            shares = logits.softmax(0)
            most = max(most, float(shares[unit * UNIT : unit * UNIT + UNIT].sum()))
            if unit > 1:
                most = max(most, float(shares[unit * UNIT - UNIT // 2 : unit * UNIT].sum()))
    return most


@settings(max_examples=15)
@given(
    length=st.sampled_from([1, 17, 63, 127, 129, 400, 1000]),
    rows=st.integers(1, 16),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    sinks=st.sampled_from([0, 20]),
)
def test_units_that_are_looked_at_most_stay(
    length: int, rows: int, share: float, sinks: int
) -> None:
    query, key = draw(length, min(rows, length))
    rule = {"unit": UNIT, "sink_keys": sinks, "last_keys": 16}
    selector = DecodeSelector(**rule, share=0.2, prompt_share=share)
    stays = pin_prompt(query, key, length=length, selector=selector, scale=SCALE)
    count = -(-length // UNIT)
    free = range(-(-sinks // UNIT), count - 1)
    assert stays.shape == (KV_HEADS, count)
    for head in range(KV_HEADS):
        weights = {unit: weigh(query, key, length, head, unit) for unit in free}
        best = sorted(free, key=lambda unit: -weights[unit])[
            : floor(share * ceil(0.2 * count) + 0.5)
        ]
        assert stays[head].nonzero().flatten().tolist() == sorted(best)


def test_a_single_key_far_from_the_others_stays_and_what_follows_it() -> None:
    query, key = draw(1000, 4)
    key *= 0.1
    place = 20 * UNIT + UNIT - 1
    key[:, place] = query[2].view(KV_HEADS, 2, WIDTH)[:, 1] * 5
    selector = DecodeSelector(unit=UNIT, budget=4 * UNIT, prompt_share=0.5)
    stays = pin_prompt(query, key, length=1000, selector=selector, scale=SCALE)
    assert [head.nonzero().flatten().tolist() for head in stays] == [[20, 21]] * 2


def test_many_keys_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = draw(500, 13)
    selector = DecodeSelector(unit=UNIT, share=0.5, prompt_share=0.5)
    whole = pin_prompt(query, key, length=500, selector=selector, scale=SCALE)
    for rows in (1, 5):
        monkeypatch.setattr(pinned, "MOST_LOGITS", rows * HEADS * key.shape[1])
        parts = pin_prompt(query, key, length=500, selector=selector, scale=SCALE)
        assert torch.equal(parts, whole)


def test_keys_after_the_prompt_are_not_read() -> None:
    query, key = draw(490, 16)
    selector = DecodeSelector(unit=UNIT, share=0.5, prompt_share=0.5)
    expected = pin_prompt(query, key, length=490, selector=selector, scale=SCALE)
    key[:, 490:] = torch.nan
    found = pin_prompt(query, key, length=490, selector=selector, scale=SCALE)
    assert torch.equal(found, expected)


def test_pinned_units_are_kept_beside_the_first_and_the_last_ones() -> None:
    call = create_decoding([1000, 330], pinned=0.05)
    selector = DecodeSelector(share=0.2, min_keys=0, unit=UNIT, sink_keys=16, last_keys=16)
    masses = estimate_masses(call.query, call.units, call.tables, call.lengths, scale=SCALE)
    stays = call.units.read_pinned(call.tables.long())
    exists = torch.arange(stays.shape[-1]) < (-(-call.lengths // UNIT))[:, None, None]
    kept = keep_units(masses, call.lengths, selector, stays)
    plain = keep_units(masses, call.lengths, selector)
    assert bool((stays & exists).any())
    assert not (stays & exists & ~kept).any()
    assert torch.equal(kept.sum(-1), plain.sum(-1))
    # The others are the best of what is left.
    others = kept & ~stays
    assert not (others & ~plain).any()


def test_a_unit_that_is_written_to_is_pinned_no_longer() -> None:
    call = create_decoding([100])
    call.units.pinned.fill_(1)
    page = int(call.tables[0, 6])
    call.summaries.update(torch.tensor([page * UNIT + 4]))
    assert call.units.pinned.eq(0).nonzero().tolist() == [[page, 0, 0], [page, 1, 0]]


def test_pins_are_replaced_by_those_of_the_next_prompt() -> None:
    call = create_decoding([100])
    at = call.tables[0, :7].long()
    for seed in range(2):
        stays = torch.rand(KV_HEADS, 7, generator=torch.Generator().manual_seed(seed)) < 0.5
        call.units.pin(at, stays)
        assert torch.equal(call.units.read_pinned(at[None])[0], stays)


@pytest.mark.parametrize(
    ("rule", "number"),
    [
        ({"share": 0.1}, 3),
        ({"share": 0.05}, 2),
        ({"share": 0.1, "prompt_share": 0.5}, 13),
        ({"budget": 1024}, 4),
        ({"budget": 1024, "share": 0.1}, 3),
        ({"top_p": 0.9}, 3),
        ({"top_p": 0.9, "share": 0.3}, 10),
        ({"share": 0.1, "prompt_share": 0}, 0),
    ],
)
def test_the_end_of_a_prompt_chooses_a_part_of_what_is_kept(
    rule: dict[str, Any], number: int
) -> None:
    assert pinned.count_pinned(256, DecodeSelector(**rule)) == number


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_the_share_of_a_prompt_is_one(value: float) -> None:
    with pytest.raises(ValueError, match="prompt_share must be"):
        DecodeSelector(prompt_share=value)
