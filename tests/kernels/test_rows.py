"""The kernels for keys that lie one after the other, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from unisparse_flex.block_masks.pages import (
    DecodeSelector,
    PageTables,
    UnitSummaries,
    choose_units,
    summarize_rows,
)

from .interpreter import Kernels

UNIT = 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads_last", [False, True])
def test_units_follow_the_rows_that_were_written(
    kernels: Kernels, heads_last: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 160, 8, generator=generator).to(dtype)
    keys[1, 0, 40, 3] = torch.inf
    if heads_last:
        keys = keys.transpose(1, 2).contiguous().transpose(1, 2)
    found, expected = (UnitSummaries.create(keys, UNIT) for _ in range(2))
    length = 0
    for rows in (33, 1, 1, 14, 34, 16, 2, 1):
        length += rows
        lengths = torch.full((2,), length, dtype=torch.int32)
        kernels.rows.summarize_rows(
            keys, lengths, found.numbers, found.scales, rows=rows, unit=UNIT
        )
        summarize_rows(keys, expected, lengths, torch.tensor(length), rows)
        count = -(-length // UNIT)
        assert bool(expected.scales[0, :, :count, 0].all())
        assert not found.scales[:, :, count:].any()
        every = torch.arange(2)
        for ours, theirs in zip(found.read(every), expected.read(every), strict=True):
            # A number may be rounded the other way.
            torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=0.03, equal_nan=True)
    assert expected.read(torch.tensor([1]))[0][0, 0, 2].isnan().any()


def test_units_are_named_by_their_place_in_the_sequence(kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(2, 2, 320, 8, generator=generator)
    query = torch.randn(2, 4, 8, generator=generator) * 3
    lengths = torch.tensor([311, 311], dtype=torch.int32)
    units = UnitSummaries.create(keys, UNIT)
    summarize_rows(keys, units, lengths, torch.tensor(311), 311)
    selector = DecodeSelector(budget=96, min_keys=0, unit=UNIT, sink_keys=16, last_keys=16)
    order = torch.arange(2, dtype=torch.int32)[:, None]
    found, expected = (
        PageTables.create(4, 20, torch.zeros(2, dtype=torch.int64)) for _ in range(2)
    )
    steps = (0, 0, 1)
    choose_units(query, units, order, lengths, expected, selector=selector, scale=0.3, steps=steps)
    kernels.decode.choose_units(
        query,
        units.numbers,
        units.scales,
        units.pinned,
        order,
        lengths,
        found.tables,
        found.lengths,
        found.counter,
        unit=UNIT,
        rule=selector.rule,
        scale=0.3,
        steps=steps,
    )
    assert torch.equal(found.lengths, expected.lengths)
    assert torch.equal(found.tables[:, :6], expected.tables[:, :6])
    assert found.tables[:, 5].tolist() == [19] * 4
