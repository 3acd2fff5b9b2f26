"""Pages for decoding queries, in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.block_masks.pages import (
    DecodeSelector,
    PageTables,
    UnitSummaries,
    estimate_masses,
    keep_units,
    units_share,
)

from .decoding import Decoding, create_decoding

UNIT, SCALE = 16, 0.3
SMALLEST = DecodeSelector(share=0.01, min_keys=0, unit=UNIT, sink_keys=16, last_keys=0)
LENGTHS = st.lists(st.integers(0, 150), min_size=1, max_size=4)


def estimate(call: Decoding) -> Tensor:
    return estimate_masses(call.query, call.units, call.tables, call.lengths, scale=SCALE)


def choose(call: Decoding, selector: DecodeSelector) -> PageTables:
    out = call.outputs()
    call.choose(selector, out, scale=SCALE)
    return out


def true_masses(call: Decoding) -> list[Tensor]:
    """[Hkv, G, pages] of each request: logarithms of what its keys weigh."""
    found = []
    for query, keys in zip(call.query, call.keys, strict=True):
        rows = query.unflatten(0, (keys.shape[0], -1))
        logits = torch.einsum("hgd,hkd->hgk", rows, keys) * SCALE
        found.append(torch.stack([part.logsumexp(-1) for part in logits.split(UNIT, -1)], -1))
    return found


@pytest.mark.parametrize("page", [16, 64])
def test_masses_of_keys_that_are_alike_are_nearly_exact(page: int) -> None:
    call = create_decoding([5, 16, 100], page=page)
    with_one = [keys[:, :1].expand_as(keys) for keys in call.keys]
    cache = call.summaries.pages
    for table, keys in zip(call.tables, with_one, strict=True):
        for i, key in enumerate(keys.unbind(1)):
            cache[table[i // page], :, i % page] = key
            call.summaries.update(table[i // page].long()[None] * page + i % page)
    found = estimate(call)
    expected = true_masses(
        Decoding(call.query, call.summaries, call.tables, call.lengths, with_one)
    )
    for masses, exact in zip(found, expected, strict=True):
        count = exact.shape[-1]
        torch.testing.assert_close(masses[..., :count], exact, rtol=1e-2, atol=5e-2)
        assert bool((masses[..., count:] == -torch.inf).all())


def test_the_spread_brings_masses_nearer_to_the_true_ones() -> None:
    call = create_decoding([3000], page=64, head_dim=32)
    found = estimate(call)[0]
    call.units.scales[..., 1] = 0
    means = estimate(call)[0]
    exact = true_masses(call)[0]
    count = exact.shape[-1]
    errors = [(masses[..., :count] - exact).abs().mean() for masses in (found, means)]
    assert errors[0] < errors[1] / 2


@settings(max_examples=40)
@given(
    lengths=LENGTHS,
    shared=st.integers(0, 3),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    budget=st.sampled_from([None, 1, 40]),
    share=st.sampled_from([None, 0.1, 0.5]),
    fewest=st.sampled_from([0, 20, 60]),
    sinks=st.integers(0, 40),
    last=st.integers(0, 40),
    page=st.sampled_from([16, 32]),
)
def test_kept_pages_are_what_the_rule_says(
    lengths: list[int],
    shared: int,
    top_p: float,
    budget: int | None,
    share: float | None,
    fewest: int,
    sinks: int,
    last: int,
    page: int,
) -> None:
    call = create_decoding(lengths, page=page, shared=shared)
    selector = DecodeSelector(
        top_p=top_p,
        budget=budget,
        share=share,
        min_keys=fewest,
        sink_keys=sinks,
        last_keys=last,
        unit=UNIT,
    )
    sinks, last, least = selector.rule.sinks, selector.rule.last, selector.rule.fewest
    masses = estimate(call)
    kept = keep_units(masses, call.lengths, selector)
    for length, own, rows in zip(lengths, kept, masses, strict=True):
        count = -(-length // UNIT)
        assert not own[:, count:].any()
        if count <= least:
            assert bool(own[:, :count].all())
            continue
        assert bool(own[:, :sinks].all())
        assert bool(own[:, count - last : count].all())
        limit = count if budget is None else min(count, -(-budget // UNIT))
        limit = limit if share is None else min(limit, int(-(-count * share // 1)))
        for head, row in zip(own, rows.softmax(-1).mean(1), strict=True):
            total = int(head.sum())
            assert least <= total <= max(limit, least)
            middle = torch.arange(head.shape[0])[sinks : count - last]
            best = row[middle[head[middle]]].min() if head[middle].any() else torch.tensor(9.0)
            left = row[middle[~head[middle]]]
            # Shares that agree in 8 bits are alike.
            alike = float(best) * 2.0**-7
            assert not left.numel() or bool(left.max() <= best + alike)
            if total < limit:
                assert float(row[head].sum()) >= top_p - 1e-5
            if total > least:
                assert float(row[head].sum() - best) < top_p + alike + 1e-5


@settings(max_examples=25)
@given(
    lengths=LENGTHS,
    shared=st.integers(0, 3),
    share=st.sampled_from([0.3, 1.0]),
    page=st.sampled_from([16, 64]),
)
def test_named_units_hold_the_kept_keys_in_order(
    lengths: list[int], shared: int, share: float, page: int
) -> None:
    call = create_decoding(lengths, page=page, shared=shared)
    selector = DecodeSelector(share=share, min_keys=20, unit=UNIT)
    masses = estimate(call)
    kept = keep_units(masses, call.lengths, selector)
    out = choose(call, selector)
    flat = call.summaries.pages.unflatten(2, (-1, UNIT)).flatten(0, 2)
    for request, keys in enumerate(call.keys):
        for head in range(2):
            sequence = request * 2 + head
            length = int(out.lengths[sequence])
            found = flat[out.tables[sequence].long()].flatten(0, 1)[:length]
            tokens = kept[request, head].repeat_interleave(UNIT)[: keys.shape[1]]
            assert torch.equal(found, keys[head][tokens])
    assert out.counter.tolist() == [
        int(kept.sum()),
        2 * sum(-(-length // UNIT) for length in lengths),
    ]


def test_a_unit_of_keys_that_are_not_finite_is_kept() -> None:
    call = create_decoding([200])
    cache, page = call.summaries.pages, int(call.tables[0, 5])
    cache[page, 1, 3, 2] = torch.inf
    call.summaries.update(torch.tensor([page * 16 + 15]))
    masses = estimate(call)
    kept = keep_units(masses, call.lengths, SMALLEST)
    assert bool(kept[0, 1, 5])
    assert kept[0].sum(-1).tolist() == [2, 3]


def test_a_stale_summary_chooses_other_pages() -> None:
    call = create_decoding([400])
    selector = replace(SMALLEST, share=0.3)
    before = choose(call, selector).tables.clone()
    page = int(call.tables[0, 7])
    call.summaries.pages[page] = 4 * call.query[0, ::2, None]
    assert torch.equal(choose(call, selector).tables, before)
    call.summaries.update(torch.arange(page * 16, page * 16 + 16))
    assert not torch.equal(choose(call, selector).tables, before)


def test_masses_of_float64_keys_are_of_float64() -> None:
    call = create_decoding([40], dtype=torch.float64)
    found = estimate(call)
    assert found.dtype == torch.float64


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("budget", 0),
        ("share", 0.0),
        ("min_keys", -1),
        ("sink_keys", -1),
        ("last_keys", -1),
        ("unit", 8),
        ("unit", 48),
    ],
)
def test_a_selector_refuses_what_is_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must be"):
        DecodeSelector(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("page", "head_dim"), [(64, 64), (128, 128)])
def test_units_take_the_stated_share_of_a_cache(page: int, head_dim: int) -> None:
    keys = torch.zeros(3, 2, page, head_dim, dtype=torch.bfloat16)
    units = UnitSummaries.create(keys, 32)
    assert units.nbytes == pytest.approx(units_share(32, head_dim) * 2 * keys.nbytes)
    assert units_share(32, head_dim) < 0.02


def test_of_units_that_are_alike_the_earlier_ones_are_kept() -> None:
    # They sum to one; all but two lie between 204 and 205 parts of 2^-11.
    numbers = [0.0997, 0.0998, 0.0999, 0.2, 0.0997, 0.1, 0.0997, 0.0998, 0.1014]
    shares = torch.tensor(numbers, dtype=torch.float64)
    selector = DecodeSelector(share=0.5, min_keys=0, unit=UNIT, sink_keys=0, last_keys=0)
    kept = keep_units(shares.log()[None, None, None], torch.tensor([9 * UNIT]), selector)
    # Half of nine, the last of them always.
    assert kept.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 8]
    more = shares.clone()
    more[5] += 0.0003
    more[4] -= 0.0003
    kept = keep_units(more.log()[None, None, None], torch.tensor([9 * UNIT]), selector)
    assert kept.flatten().nonzero().flatten().tolist() == [0, 1, 3, 5, 8]
