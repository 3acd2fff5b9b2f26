"""The kernels that choose pages for decoding, against plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.block_masks.decoding import Decoding, create_decoding
from unisparse_flex.block_masks.pages import DecodeSelector, PageTables

from .interpreter import Kernels

UNIT, SCALE = 16, 0.3


def run(
    kernels: Kernels,
    call: Decoding,
    selector: DecodeSelector,
    out: PageTables,
    packed: Tensor | None = None,
    few: int = 0,
    is_behind: bool = False,
) -> None:
    """The kernels, interpreted."""
    summaries = call.summaries
    kernels.decode.choose_units(
        call.query,
        call.units.numbers,
        call.units.scales,
        call.units.pinned,
        call.tables,
        call.lengths,
        out.tables,
        out.lengths,
        out.counter,
        unit=UNIT,
        rule=selector.rule._replace(whole=few // UNIT),
        scale=SCALE,
        steps=call.steps,
        packed=packed,
        written=(summaries.pages, summaries.means) if is_behind else None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("page", "pinned"), [(16, 0.0), (64, 0.0), (64, 0.1)])
@pytest.mark.parametrize(
    "selector",
    [
        DecodeSelector(top_p=0.7, min_keys=32, unit=UNIT),
        DecodeSelector(budget=100, min_keys=0, sink_keys=20, last_keys=20, unit=UNIT),
        DecodeSelector(share=0.2, top_p=0.9, min_keys=0, sink_keys=0, unit=UNIT),
        DecodeSelector(unit=UNIT),
    ],
)
def test_units_are_those_of_plain_pytorch(
    kernels: Kernels,
    selector: DecodeSelector,
    page: int,
    pinned: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Sequences of every size, and more rounds than one; two choices where they are many.
    monkeypatch.setattr(kernels.decode, "SMALL", 16)
    monkeypatch.setattr(kernels.decode, "MIDDLE", 32)
    monkeypatch.setattr(kernels.decode, "FEW", 100 if page == 16 else 0)
    monkeypatch.setattr(kernels.decode, "ROWS", 16)
    monkeypatch.setattr(kernels.decode, "PROGRAMS", 24)
    call = create_decoding([0, 1, 33, 400, 397, 1000], page=page, pinned=pinned, dtype=dtype)
    found, expected = call.outputs(), call.outputs()
    call.choose(selector, expected, scale=SCALE)
    run(kernels, call, selector, found)
    assert torch.equal(found.lengths, expected.lengths)
    assert torch.equal(found.counter, expected.counter)
    for i, length in enumerate(expected.lengths.tolist()):
        count = -(-length // UNIT)
        assert torch.equal(found.tables[i, :count], expected.tables[i, :count])
    kept, visible = found.counter.tolist()
    assert kept == visible if selector.keeps_all else kept < visible


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("few", [0, 400])
def test_summaries_are_brought_up_to_date_with_the_last_key(
    kernels: Kernels, page: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last key of an empty, a new, a filled and a half filled unit; and of a page.
    lengths = [0, 1, 32, 33, 400, 397, 1024]
    monkeypatch.setattr(kernels.decode, "ROWS", 16)
    monkeypatch.setattr(kernels.decode, "PROGRAMS", 24)
    fresh, stale = (create_decoding(lengths, page=page) for _ in range(2))
    last = [int(t[(n - 1) // page]) for t, n in zip(fresh.tables, lengths, strict=True) if n]
    own, units = fresh.summaries, fresh.units
    slots = [at * page + (n - 1) % page for at, n in zip(last, lengths[1:], strict=True)]
    kernels.pages.summarize(
        own.pages, own.means, (units.numbers, units.scales, units.pinned), torch.tensor(slots)
    )
    for tensor in (stale.units.numbers, stale.units.scales, stale.summaries.means):
        tensor[last] = 3
    for i, (at, length) in enumerate(zip(last, lengths[1:], strict=True)):
        # Of these pages only what holds the last key is out of date.
        part = (length - 1) % page // UNIT
        for name in ("numbers", "scales"):
            was, now = getattr(units, name)[at], getattr(stale.units, name)[at]
            now[:, :part], now[:, part + 1 :] = was[:, :part], was[:, part + 1 :]
        stale.units.pinned[at, i % 2, part] = 1
        if length % page:
            stale.summaries.means[at] = own.means[at]
    selector = DecodeSelector(share=0.2, top_p=0.9, min_keys=0, last_keys=0, unit=UNIT)
    found, expected = stale.outputs(), fresh.outputs()
    run(kernels, fresh, selector, expected, few=few)
    run(kernels, stale, selector, found, few=few, is_behind=True)
    assert torch.equal(found.lengths, expected.lengths)
    for name in ("numbers", "scales", "pinned"):
        assert torch.equal(getattr(stale.units, name), getattr(units, name))
    assert torch.equal(stale.summaries.means, own.means)


@pytest.mark.parametrize("few", [0, 15, 40, 400, 5000])
def test_requests_of_few_keys_are_read_whole(kernels: Kernels, few: int) -> None:
    lengths = [0, 15, 33, 400, 401, 1000]
    call = create_decoding(lengths)
    found, expected, plain = call.outputs(), call.outputs(), call.outputs()
    selector = DecodeSelector(share=0.1, min_keys=0, sink_keys=0, unit=UNIT)
    call.choose(selector, expected, scale=SCALE, few=few)
    call.choose(selector, plain, scale=SCALE)
    run(kernels, call, selector, found, few=few)
    assert torch.equal(found.lengths, expected.lengths)
    for i, (length, kept) in enumerate(zip(lengths, found.lengths.view(-1, 2), strict=True)):
        # In whole units.
        is_whole = -(-length // UNIT) <= max(few // UNIT, selector.rule.fewest)
        assert kept.eq(length).all() == is_whole
        rows = slice(2 * i, 2 * i + 2)
        if not is_whole:
            assert torch.equal(kept, plain.lengths[rows])
        count = int(-(-kept[0] // UNIT))
        assert torch.equal(found.tables[rows, :count], expected.tables[rows, :count])


def test_a_unit_of_keys_that_are_not_finite_is_kept(kernels: Kernels) -> None:
    call = create_decoding([300])
    page = int(call.tables[0, 5])
    call.summaries.pages[page, 1, 3, 2] = torch.inf
    call.summaries.update(torch.tensor([page * 16 + 15]))
    found = call.outputs()
    selector = DecodeSelector(share=0.01, min_keys=0, unit=UNIT, sink_keys=16, last_keys=0)
    run(kernels, call, selector, found)
    assert found.tables[1, 1] == page * 2 + 1
    assert found.lengths.tolist() == [UNIT + 300 % UNIT, 2 * UNIT + 300 % UNIT]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_among_keys_and_values_is_packed(kernels: Kernels, dtype: torch.dtype) -> None:
    call = create_decoding([0, 33, 400], dtype=dtype)
    heads, width = call.query.shape[1:]
    wide = torch.zeros(3, heads + 4, width, dtype=dtype)
    wide[:, :heads] = call.query
    packed = torch.full_like(call.query, torch.nan)
    apart = replace(call, query=wide[:, :heads])
    found, expected = call.outputs(), call.outputs()
    selector = DecodeSelector(share=0.2, min_keys=0, unit=UNIT)
    run(kernels, apart, selector, found, packed)
    run(kernels, call, selector, expected)
    assert torch.equal(packed, call.query)
    assert torch.equal(found.lengths, expected.lengths)
