"""The choice of units for decoding on a GPU, against plain PyTorch, alone and in a CUDA graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.block_masks.decoding import Decoding, create_decoding
from unisparse_flex.block_masks.pages import (
    DecodeSelector,
    PageSummaries,
    PageTables,
    pin_prompt,
)

pytestmark = pytest.mark.gpu

LENGTHS = [0, 1, 33, 4000, 3970, 9999]
SCALE = 0.1


def on_cpu(call: Decoding) -> Decoding:
    held = call.units
    units = replace(
        held, numbers=held.numbers.cpu(), scales=held.scales.cpu(), pinned=held.pinned.cpu()
    )
    summaries = PageSummaries(
        pages=call.summaries.pages.cpu(), means=call.summaries.means.cpu(), units=units
    )
    tensors = (call.query.cpu(), summaries, call.tables.cpu(), call.lengths.cpu())
    return Decoding(*tensors, [keys.cpu() for keys in call.keys])


def assert_same(found: PageTables, expected: PageTables, unit: int) -> None:
    assert torch.equal(found.lengths.cpu(), expected.lengths)
    for i, length in enumerate(expected.lengths.tolist()):
        count = -(-length // unit)
        ours, theirs = (
            set(tables[i, :count].tolist()) for tables in (found.tables, expected.tables)
        )
        # Shares that round alike may change places.
        assert len(ours - theirs) <= 1
        assert found.tables[i, :count].tolist()[-1:] == expected.tables[i, :count].tolist()[-1:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("page", "unit"), [(128, 32), (128, 128), (64, 32)])
@pytest.mark.parametrize(
    "selector",
    [
        DecodeSelector(share=0.1, min_keys=0),
        DecodeSelector(budget=1024),
        DecodeSelector(top_p=0.8, min_keys=256),
        DecodeSelector(),
    ],
)
def test_units_are_those_of_plain_pytorch(
    selector: DecodeSelector, page: int, unit: int, dtype: torch.dtype
) -> None:
    call = create_decoding(
        LENGTHS,
        page=page,
        unit=unit,
        heads=8,
        head_dim=128,
        pinned=0.02,
        dtype=dtype,
        device="cuda",
    )
    plain = on_cpu(call)
    selector = selector.of_unit(unit)
    found, expected = call.outputs(), plain.outputs()
    call.choose(selector, found, scale=SCALE)
    plain.choose(selector, expected, scale=SCALE)
    if selector.top_p == 1.0:
        assert_same(found, expected, unit)
        assert torch.equal(found.counter.cpu(), expected.counter)
    else:
        # Sums of shares that lie on the threshold differ by rounding.
        difference = (found.lengths.cpu() - expected.lengths).abs().max()
        assert difference <= unit


def test_a_graph_chooses_for_other_lengths_and_queries() -> None:
    call = create_decoding(LENGTHS, page=128, unit=32, head_dim=64, device="cuda")
    selector = DecodeSelector(share=0.2, min_keys=64)
    found, expected = call.outputs(), call.outputs()
    call.choose(selector, found, scale=SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.choose(selector, found, scale=SCALE)
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        call.query.normal_(generator=generator)
        call.lengths.copy_(torch.tensor([10 * seed, 1, 20, 4000 - 7 * seed, 100, 5000]))
        graph.replay()
        call.choose(selector, expected, scale=SCALE)
        assert torch.equal(found.lengths, expected.lengths)
        for i, length in enumerate(expected.lengths.tolist()):
            count = -(-length // 32)
            assert torch.equal(found.tables[i, :count], expected.tables[i, :count])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("requests", [1, 3, 40])
@pytest.mark.parametrize("few", [0, 2000])
def test_summaries_are_brought_up_to_date_on_the_way(
    requests: int, few: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(requests)
    lengths = torch.randint(1, 20000 if requests < 40 else 3000, (requests,), generator=generator)
    late, early = (
        create_decoding(
            lengths.tolist(), page=128, unit=32, head_dim=128, dtype=dtype, device="cuda"
        )
        for _ in range(2)
    )
    selector = DecodeSelector(share=0.1, min_keys=0)
    for step in range(30):
        pages = early.tables.gather(1, (early.lengths[:, None] - 1).long() // 128)[:, 0].long()
        slots = pages * 128 + (early.lengths - 1) % 128
        for call in (late, early):
            call.query.normal_(generator=torch.Generator("cuda").manual_seed(step))
            # The last key is another one, so that what was known of it is wrong.
            call.summaries.pages[pages, :, (call.lengths - 1) % 128] *= -1.5
        early.summaries.update(slots)
        found, expected = late.outputs(), early.outputs()
        late.choose(selector, found, scale=SCALE, few=few, is_behind=True)
        early.choose(selector, expected, scale=SCALE, few=few)
        # Sums in another order.
        torch.testing.assert_close(late.units.scales, early.units.scales, rtol=1e-2, atol=0)
        differ = late.units.numbers.int() - early.units.numbers.int()
        assert int(differ.abs().max()) <= 1
        assert torch.equal(late.units.pinned, early.units.pinned)
        torch.testing.assert_close(
            late.summaries.means, early.summaries.means, rtol=1e-2, atol=1e-3
        )
        assert torch.equal(found.counter, expected.counter)
        assert torch.equal(found.lengths, expected.lengths)
        for i, length in enumerate(expected.lengths.tolist()):
            count = -(-length // 32)
            ours, theirs = (set(t.tables[i, :count].tolist()) for t in (found, expected))
            # Sums in another order may round otherwise.
            assert len(ours - theirs) <= 1
        for call in (late, early):
            call.lengths.sub_(1).clamp_min_(1)


@pytest.mark.parametrize("length", [500, 4001])
def test_what_the_end_of_a_prompt_looks_at_is_that_of_the_cpu(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(16, 8, 128, generator=generator) * 3
    key = torch.randn(2, -(-length // 128) * 128, 128, generator=generator)
    selector = DecodeSelector(share=0.5, prompt_share=0.5)
    expected = pin_prompt(query, key, length=length, selector=selector, scale=SCALE)
    found = pin_prompt(query.cuda(), key.cuda(), length=length, selector=selector, scale=SCALE)
    assert torch.equal(found.sum(-1).cpu(), expected.sum(-1))
    # Weights that round alike may change places.
    assert int((found.cpu() & ~expected).sum(-1).max()) <= 1


def test_units_that_are_written_to_are_pinned_no_longer() -> None:
    call = create_decoding([900], page=128, unit=32, head_dim=64, device="cuda")
    call.units.pinned.fill_(1)
    page = int(call.tables[0, 2])
    places = torch.tensor([40, *range(96, 128)], device="cuda")
    call.summaries.update(page * 128 + places)
    freed = call.units.pinned.eq(0).nonzero().tolist()
    assert freed == [[page, head, part] for head in (0, 1) for part in (1, 3)]
