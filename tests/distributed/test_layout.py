"""How a sequence is shared out, in one process."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unisparse_flex.distributed import SequenceLayout, Span

layouts = st.builds(
    lambda ranks, blocks, ragged, balanced, earlier: SequenceLayout(
        pieces=(*(16 * (ranks + extra) for extra in earlier), 16 * (ranks + blocks) - ragged),
        ranks=ranks,
        block_size=16,
        balanced=balanced,
    ),
    st.integers(1, 9),
    st.integers(0, 40),
    st.integers(0, 15),
    st.booleans(),
    st.lists(st.integers(0, 20), max_size=2),
)


@given(layout=layouts)
def test_every_token_has_one_rank(layout: SequenceLayout) -> None:
    ranks = range(layout.ranks)
    positions = torch.cat([layout.positions(rank) for rank in ranks])
    assert torch.equal(positions.sort().values, torch.arange(layout.length))
    assert [layout.local_length(rank) for rank in ranks] == [
        len(layout.positions(rank)) for rank in ranks
    ]


@given(layout=layouts)
def test_parts_make_the_whole_again(layout: SequenceLayout) -> None:
    tensor = torch.arange(2 * layout.length).view(2, layout.length)
    parts = [layout.shard(tensor, 1, rank) for rank in range(layout.ranks)]
    assert torch.equal(layout.assemble(parts, 1), tensor)
    longest = max(part.shape[1] for part in parts)
    padded = [torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts]
    assert torch.equal(layout.assemble(padded, 1), tensor)


@given(layout=layouts)
def test_runs_are_whole_blocks_and_ranks_hold_alike_many(layout: SequenceLayout) -> None:
    counts = []
    for rank in range(layout.ranks):
        spans = layout.spans(rank)
        assert spans
        assert all(span.start % 16 == 0 for span in spans)
        assert all(span.stop % 16 == 0 or span.stop == layout.length for span in spans)
        assert all(a.stop < b.start for a, b in pairwise(spans))
        counts.append(sum(span.length for span in layout.blocks(rank)))
    pieces = len(layout.pieces)
    assert max(counts) - min(counts) <= 2 * pieces


@given(ranks=st.integers(1, 16), each=st.integers(1, 8))
def test_zig_zag_shares_causal_work_evenly(ranks: int, each: int) -> None:
    blocks = 2 * ranks * each
    layout = SequenceLayout(pieces=(16 * blocks,), ranks=ranks, block_size=16)
    work = [
        sum(block + 1 for span in layout.blocks(rank) for block in range(*span))
        for rank in range(ranks)
    ]
    assert set(work) == {blocks * (blocks + 1) // 2 // ranks}


def test_ranks_hold_an_early_and_a_late_run() -> None:
    layout = SequenceLayout(pieces=(128,), ranks=2, block_size=16)
    assert layout.spans(0) == (Span(0, 32), Span(96, 128))
    assert layout.spans(1) == (Span(32, 96),)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"pieces": (40,), "ranks": 4}, ValueError, "must hold a block of 16 tokens for each of 4"),
        ({"pieces": (40, 64), "ranks": 2}, ValueError, r"pieces\[0\] must be a multiple"),
        ({"pieces": (0,), "ranks": 2}, ValueError, r"pieces\[0\] must be at least 1"),
        ({"pieces": 64, "ranks": 2}, TypeError, "pieces must be a tuple"),
        ({"pieces": (64,), "ranks": 0}, ValueError, "ranks must be at least 1"),
        ({"pieces": (64,), "ranks": 2, "block_size": 24}, ValueError, "block_size must be a power"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    fields: dict[str, object], error: type[Exception], message: str
) -> None:
    given_fields: dict[str, object] = {"block_size": 16, **fields}
    with pytest.raises(error, match=message):
        SequenceLayout(**given_fields)  # type: ignore[arg-type]


def test_a_tensor_of_another_length_is_refused() -> None:
    layout = SequenceLayout(pieces=(128,), ranks=2, block_size=16)
    with pytest.raises(ValueError, match="must have the sequence's 128 tokens along dim 0"):
        layout.shard(torch.zeros(127), 0, 0)
