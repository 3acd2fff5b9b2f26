"""Decoding over keys that lie one after the other, in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.block_masks.pages import (
    DecodeSelector,
    UnitSummaries,
    choose_rows,
    estimate_masses,
    keep_units,
    pin_prompt,
    pin_rows,
    summarize_rows,
)

UNIT, PLACES, SCALE = 16, 384, 0.3
ROWS = st.lists(st.sampled_from([1, 2, 15, 16, 17, 33, 63]), min_size=1, max_size=6)


def keys_of(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, PLACES, 8, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(rows=ROWS)
def test_summaries_after_any_steps_are_those_of_all_keys_at_once(rows: list[int]) -> None:
    keys = keys_of()
    found, expected = (UnitSummaries.create(keys, UNIT) for _ in range(2))
    lengths, length = torch.zeros(2, dtype=torch.int32), 0
    for count in rows:
        length += count
        summarize_rows(keys, found, lengths, torch.tensor(length), count)
        assert lengths.tolist() == [length, length]
    summarize_rows(keys, expected, lengths, torch.tensor(length), length)
    assert bool(expected.scales[:, :, : -(-length // UNIT), 0].all())
    assert torch.equal(found.numbers, expected.numbers)
    assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("length", [1, 16, 100, 256])
@pytest.mark.parametrize(
    "selector",
    [
        DecodeSelector(top_p=0.7, min_keys=32, unit=UNIT),
        DecodeSelector(budget=64, min_keys=0, sink_keys=16, last_keys=16, unit=UNIT),
        DecodeSelector(share=0.2, min_keys=0, sink_keys=0, unit=UNIT),
        DecodeSelector(share=0.2, unit=UNIT),
    ],
)
def test_chosen_units_are_those_that_are_kept(selector: DecodeSelector, length: int) -> None:
    keys = keys_of()
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(2, 6, 8, generator=generator) * 3
    lengths = torch.full((2,), length, dtype=torch.int32)
    units = UnitSummaries.create(keys, UNIT)
    units.pinned.copy_(torch.rand(units.pinned.shape, generator=generator) < 0.1)
    summarize_rows(keys, units, lengths, torch.tensor(length), length)
    order = torch.arange(2, dtype=torch.int32)[:, None]
    counter = torch.zeros(2, dtype=torch.int64)
    counts, found = choose_rows(
        query, units, order, lengths, counter, selector=selector.text, scale=SCALE
    )
    masses = estimate_masses(query, units, order, lengths, scale=SCALE)
    kept = keep_units(masses, lengths, selector, units.pinned.bool())
    for b in range(2):
        for head in range(3):
            expected = kept[b, head].nonzero().flatten().tolist()
            assert found[b, head, : len(expected)].tolist() == expected
            assert int(counts[b, head]) == len(expected) * UNIT - -length % UNIT
    assert counter.tolist() == [int(kept.sum()), 6 * -(-length // UNIT)]


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("length", [40, 200, 384])
@pytest.mark.parametrize(
    "selector",
    [
        DecodeSelector(top_p=0.7, min_keys=32, unit=UNIT, prompt_share=1.0),
        DecodeSelector(budget=64, min_keys=0, unit=UNIT, prompt_share=0.5, sink_keys=0),
        DecodeSelector(share=0.3, min_keys=100, unit=UNIT, prompt_share=0.5),
    ],
)
def test_pins_are_those_of_the_prompts_one_by_one(
    selector: DecodeSelector, length: int, rows: int
) -> None:
    keys = keys_of()
    query = torch.randn(2, rows, 6, 8, generator=torch.Generator().manual_seed(length)) * 3
    lengths = torch.full((2,), length, dtype=torch.int32)
    units = UnitSummaries.create(keys, UNIT)
    units.pinned.fill_(1)
    pin_rows(query, keys, units, lengths, selector=selector.text, scale=SCALE)
    for own, key, found in zip(query, keys, units.pinned, strict=True):
        expected = pin_prompt(own, key, length=length, selector=selector, scale=SCALE)
        assert torch.equal(found.bool(), expected & (length > selector.min_keys))
    # Of 40 keys all stay in any case.
    assert bool(units.pinned.any()) == (length > 100)
