"""Masks as formulas: their text, what they say of pairs, tiles and rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from unisparse_flex.block_masks import BlockGeometry, UniSparse
from unisparse_flex.block_masks.masks import MaskProgram, hull_of, says_intervals
from unisparse_flex.block_masks.masks.hulls import has_hull
from unisparse_flex.block_masks.masks.rows import row_spans
from unisparse_flex.block_masks.masks.text import format_mask, parse_mask
from unisparse_flex.block_masks.masks.tiles import Tiles, tile_bounds

from .mask_programs import Mask, masks

CPU = torch.device("cpu")
SIZES = st.sampled_from([1, 2, 8, 16, 64])


def parse(text: str, length: int = 64, **options: Any) -> MaskProgram:
    return MaskProgram.parse(text, batch=1, q_len=length, kv_len=length, **options)


@settings(max_examples=30, deadline=None)
@given(masks())
def test_a_program_says_of_each_pair_what_its_text_says(mask: Mask) -> None:
    assert mask.everywhere()[:, 0].equal(mask.pairs())


@settings(max_examples=30, deadline=None)
@given(masks())
def test_text_is_read_back_as_what_it_was(mask: Mask) -> None:
    program = mask.program()
    again = MaskProgram.parse(
        program.text,
        tensors=program.tensors,
        numbers=program.numbers,
        batch=mask.batch,
        q_len=mask.q_len,
        kv_len=mask.kv_len,
    )
    assert again.expr == program.expr
    assert again.text == program.text


@settings(max_examples=50, deadline=None)
@given(masks(), SIZES, SIZES)
def test_tiles_that_may_not_hold_a_pair_hold_none_and_full_ones_hold_all(
    mask: Mask, q_size: int, kv_size: int
) -> None:
    q_count, kv_count = -(-mask.q_len // q_size), -(-mask.kv_len // kv_size)
    tiles = Tiles(q_size, q_count, kv_size, kv_count)
    may, must = (t.expand(mask.batch, -1, -1, -1) for t in tile_bounds(mask.program(), tiles, CPU))
    pairs = mask.everywhere()
    for i in range(q_count):
        for j in range(kv_count):
            rows = slice(i * q_size, (i + 1) * q_size)
            tile = pairs[:, 0, rows, j * kv_size : (j + 1) * kv_size]
            assert not (tile.flatten(1).any(1) & ~may[:, 0, i, j]).any()
            assert not (~tile.flatten(1).all(1) & must[:, 0, i, j]).any()


@settings(max_examples=30, deadline=None)
@given(masks())
def test_bounds_of_single_pairs_are_the_mask(mask: Mask) -> None:
    tiles = Tiles(1, mask.q_len, 1, mask.kv_len)
    may, must = (t.expand(mask.batch, -1, -1, -1) for t in tile_bounds(mask.program(), tiles, CPU))
    assert may.equal(mask.everywhere())
    assert must.equal(may)


@settings(max_examples=40, deadline=None)
@given(masks(), st.none() | st.integers(0, 30), SIZES)
def test_rows_see_keys_between_positions_as_the_pairs_say(
    mask: Mask, offset: int | None, size: int
) -> None:
    """Exactly where spans say everything, never too little where they do not."""
    spans = row_spans(mask.program(), offset, CPU)
    start = torch.arange(-(-mask.kv_len // size)) * size
    seen = spans.seen_between(start, start + size).expand(mask.batch, -1, -1)
    pairs = mask.everywhere()[:, 0]
    if offset is not None:
        pairs = pairs.tril(offset)
    expected = torch.stack([part.any(-1) for part in pairs.split(size, dim=-1)], dim=-1)
    assert not (expected & ~seen).any()
    if spans.rest is None:
        assert seen.equal(expected)
    assert not (pairs.any(1) & ~spans.key_valid).any()


@settings(max_examples=150, deadline=None)
@given(masks())
def test_the_run_of_keys_of_a_row_holds_all_that_it_sees(mask: Mask) -> None:
    program = mask.program()
    assume(has_hull(program.expr))
    hull = hull_of(program, program.expr, torch.arange(mask.q_len)[None])
    key = torch.arange(mask.kv_len)
    run = (key >= hull.first[..., None]) & (key <= hull.last[..., None])
    pairs = mask.everywhere()[:, 0]
    run, gaps = run.expand_as(pairs), hull.gaps.expand(pairs.shape[:2])
    assert not (pairs & ~run).any()
    assert run[~gaps].equal(pairs[~gaps])


@pytest.mark.parametrize(
    ("ids", "has_gaps"), [([1, 1, 2, 2, 0], False), ([1, 2, 1, 3, 3], True), ([5] * 5, False)]
)
def test_documents_in_pieces_have_gaps(ids: list[int], has_gaps: bool) -> None:
    program = parse("t0[b, q] == t0[b, kv]", 5, tensors=(torch.tensor([ids]),))
    hull = hull_of(program, program.expr, torch.arange(5)[None])
    assert bool(hull.gaps.any()) is has_gaps


@settings(max_examples=30, deadline=None)
@given(masks())
def test_causality_and_the_rest_are_the_mask(mask: Mask) -> None:
    offset, rest = mask.program().split_causal()
    rows, keys = torch.arange(mask.q_len), torch.arange(mask.kv_len)
    pairs = torch.ones(1, 1, mask.q_len, mask.kv_len, dtype=torch.bool)
    if offset is not None:
        assert offset == 0 or 0 <= offset <= mask.kv_len - mask.q_len
        pairs = pairs.tril(offset)
    if rest is not None:
        pairs = pairs & rest.pairs(rows, keys)
    assert pairs.expand(mask.batch, -1, -1, -1).equal(mask.everywhere())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(q <= kv + 39) | (q < kv)", "q <= kv + 39"),
        ("(kv <= q) & (kv <= q + 3) & (t0[b, kv])", "(kv <= q) & (t0[b, kv])"),
        ("(kv <= q) | (kv <= q + 3) | (kv <= q + n0)", "(kv <= q + 3) | (kv <= q + n0)"),
        ("(kv <= q) | (q <= kv)", "True"),
        ("(kv <= q) | (q < kv)", "True"),
        ("(kv <= q) | (q + 2 <= kv)", "(kv <= q) | (q + 2 <= kv)"),
        ("(kv <= q) & (q < kv)", "False"),
        ("(kv <= q) & (q <= kv)", "(kv <= q) & (q <= kv)"),
        ("(kv <= q) & ((q < kv) | (t0[b, kv]))", "(kv <= q) & (t0[b, kv])"),
        ("(kv <= q) & ((kv <= q + 3) | (t0[b, kv]))", "kv <= q"),
        ("(kv <= q) | ((kv <= q - 3) & (t0[b, kv]))", "kv <= q"),
        ("(kv <= q) | ((q < kv) & (t0[b, kv]))", "(kv <= q) | (t0[b, kv])"),
        ("(t0[b, kv]) & (~(t0[b, kv]) | (kv <= q))", "(t0[b, kv]) & (kv <= q)"),
    ],
)
def test_what_other_parts_of_a_mask_decide_is_dropped(text: str, expected: str) -> None:
    assert format_mask(parse_mask(text)) == expected


@settings(max_examples=30, deadline=None)
@given(masks(), st.integers(0, 1000))
def test_a_selection_under_a_program_keeps_a_key_for_every_row_that_sees_one(
    mask: Mask, seed: int
) -> None:
    selector = UniSparse(block_size=16, c_q=4, c_k=4, top_k=1, sink_blocks=0, last_query_blocks=0)
    selection, pairs = _select(mask, selector, seed)
    kept = selection.token_mask().expand_as(pairs)
    assert not (kept & ~pairs).any()
    assert (kept.any(-1) | ~pairs.any(-1)).all()
    assert not (selection.keep & ~selection.visible).any()
    assert 0 <= selection.density() <= 1


@settings(max_examples=30, deadline=None)
@given(masks(), st.integers(0, 1000))
def test_block_lists_under_a_program_are_the_mask_where_everything_is_kept(
    mask: Mask, seed: int
) -> None:
    selection, pairs = _select(mask, UniSparse(block_size=16, c_q=4, c_k=4, top_p=1.0), seed)
    assert selection.token_mask().expand_as(pairs).equal(pairs)
    partial_counts, _, full_counts, full = selection.block_lists()
    assert (partial_counts + full_counts).equal(selection.keep.sum(-1, dtype=torch.int32))
    for b, head, i in (full_counts > 0).nonzero().tolist():
        for j in full[b, head, i, : full_counts[b, head, i]].tolist():
            rows = slice(i * 16, min((i + 1) * 16, mask.q_len))
            assert pairs[b, 0, rows, j * 16 : (j + 1) * 16].all()


@settings(max_examples=20, deadline=None)
@given(masks(square=True), st.integers(0, 1000), st.sampled_from([float("nan"), 1e5]))
def test_keys_that_a_program_pads_may_hold_anything(mask: Mask, seed: int, garbage: float) -> None:
    padded = Mask(**{**_fields(mask), "text": "(kv <= q) & (t1[b, kv])"})
    selector = UniSparse(block_size=16, c_q=4, c_k=4, top_p=0.7)
    valid = padded.tensors()[1][:, : mask.kv_len]
    clean, _ = _select(padded, selector, seed)
    spoilt, _ = _select(padded, selector, seed, hidden=(~valid, garbage))
    assert spoilt.keep.equal(clean.keep)


def _fields(mask: Mask) -> dict[str, Any]:
    return {name: getattr(mask, name) for name in mask.__dataclass_fields__}


def _select(
    mask: Mask, selector: UniSparse, seed: int, hidden: tuple[Tensor, float] | None = None
) -> tuple[Any, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(mask.batch, 2, mask.q_len, 4, generator=generator)
    key = torch.randn(mask.batch, 2, mask.kv_len, 4, generator=generator)
    if hidden is not None:
        key = key.masked_fill(hidden[0][:, None, :, None], hidden[1])
    offset, rest = mask.program().split_causal()
    geometry = BlockGeometry(
        q_len=mask.q_len, kv_len=mask.kv_len, block_size=16, causal_offset=offset, mask=rest
    )
    selection = selector.compute_selection(query, key, geometry=geometry, scale=0.5, attn_mask=None)
    return selection, mask.everywhere().expand(-1, 2, -1, -1)


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("(kv <= q) & (q < kv + 40)", 40),
        ("(q <= kv + 39) & (kv <= q) & (t0[b, kv])", 40),
        ("(kv <= q) & (q < kv + n0)", 33),
        ("kv <= q", None),
        ("q < kv + 40", None),
    ],
)
def test_a_sliding_window_is_recognised(text: str, window: int | None) -> None:
    padding = torch.ones(1, 64, dtype=torch.bool)
    program = parse(text, numbers=(33,), tensors=(padding,))
    offset, rest = program.split_causal()
    assert (program if rest is None else rest).window(offset) == window


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kv <= q", True),
        ("(kv <= q) & (t0[b, kv]) & (t0[b, q])", True),
        ("(kv <= q) & (q < kv + 40) & ~(t0[b, kv])", True),
        ("t1[b, q] <= kv", True),
        ("q < 2 * kv", False),
        ("(kv <= q) | (kv < t1[b, q])", True),
        ("(kv <= q) & (t1[b, q] == t1[b, kv])", True),
        ("(kv <= q) & (t1[b, q] + 1 == t1[b, kv] - kv // 2)", True),
        ("(kv <= q) & (q // 4 == kv // 4)", True),
        ("(kv <= q) | (t0[b, kv])", True),
        ("(kv <= q) | ((t1[b, q] == t1[b, kv]) & (t0[b, kv]) & (t0[b, q]))", True),
        ("((kv <= q) & (q < kv + 9)) | (t1[b, q] == t1[b, kv])", True),
        ("((kv <= q) & (q < kv + 9)) | (kv < 4)", False),
        ("((kv <= q) & (q < kv + 9)) | (t0[b, kv])", False),
        ("(kv <= q) | (q + 9 <= kv)", False),
        ("(q - kv) // 2 == 0", False),
        ("~(t1[b, q] == t1[b, kv])", False),
    ],
)
def test_masks_of_intervals_are_recognised(text: str, expected: bool) -> None:
    assert says_intervals(text) is expected


def test_what_was_prepared_of_a_mask_stands_after_the_tensors_that_it_names() -> None:
    valid, table = torch.ones(1, 64, dtype=torch.bool), torch.zeros(3)
    program = parse("(t0[b, kv]) & (kv <= q)", tensors=(valid, table))
    assert program.named == (valid,)
    assert program.prepared == (table,)
    assert parse("kv <= q", tensors=(table,)).named == ()


def test_a_window_counts_from_the_rows_own_position() -> None:
    program = MaskProgram.parse("(kv <= q + 30) & (q < kv + 10)", batch=1, q_len=20, kv_len=50)
    offset, rest = program.split_causal()
    assert offset == 30
    assert rest is not None
    assert rest.window(offset) == 40


@pytest.mark.parametrize("text", ["kv <= q", "t0[b, kv] == t0[b, q]", "(kv <= q) | (kv < t1[b])"])
def test_masks_in_which_rows_see_themselves_need_no_rows_checked(text: str) -> None:
    tensors = (torch.zeros(1, 64, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert parse(text, tensors=tensors).holds_at(0)
    assert not parse(f"({text}) & (kv < 60)", tensors=tensors).holds_at(0)
    assert not parse(text.replace("<=", "<").replace("==", "<"), tensors=tensors).holds_at(0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "kv <=",
        "q",
        "h <= q",
        "kv <= q <= 3",
        "__import__('os')",
        "t0.sum() <= q",
        "x[b] <= q",
        "kv <= q / 2",
        "kv // -2 <= q",
        "kv <= 1.5",
        "not t0[b]",
        "kv != q",
        "q * kv <= 2",
    ],
)
def test_what_is_no_mask_expression_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="mask must be a mask expression, got"):
        parse(text, tensors=(torch.zeros(1),))


@pytest.mark.parametrize("text", ["t1[b, kv]", "kv <= q + n0"])
def test_a_program_names_only_what_is_given(text: str) -> None:
    with pytest.raises(ValueError, match="mask must name tensors and numbers that are given"):
        parse(text, tensors=(torch.zeros(1, 64, dtype=torch.bool),))


def test_entries_at_the_ends_of_their_type_compare_as_they_are() -> None:
    limits = torch.iinfo(torch.int64)
    entries = torch.tensor([[limits.min, limits.max, 0, 3]])
    rows = torch.arange(4)
    for text, expected in [
        ("t0[b, kv] <= q", entries[0][None, :] <= rows[:, None]),
        ("q < t0[b, kv]", rows[:, None] < entries[0][None, :]),
        ("t0[b, kv] <= t0[b, q]", entries[0][None, :] <= entries[0][:, None]),
        ("t0[b, kv] < t0[b, q]", entries[0][None, :] < entries[0][:, None]),
        ("t0[b, kv] == t0[b, q]", entries[0][None, :] == entries[0][:, None]),
    ]:
        program = parse(text, 4, tensors=(entries,))
        assert program.pairs(rows, rows)[0, 0].equal(expected)
        for bound in tile_bounds(program, Tiles(1, 4, 1, 4), CPU):
            assert bound[0, 0].equal(expected)


def test_a_number_beside_a_tensor_stays_a_number() -> None:
    # Inductor's CuTe code cannot cast a constant.
    ids = torch.tensor([[1, 2, 3, 4]])
    program = parse("(kv <= q) | (t0[b, kv] == 3) | (2 < t1[b, q])", 4, tensors=(ids, ids))

    def mask_mod(b: Tensor, q: Tensor, kv: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return program.evaluate(b, q, kv, tensors=(first, second))

    position = torch.tensor([1], dtype=torch.int32)
    graph = make_fx(mask_mod)(position * 0, position, position, ids, ids)
    made = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert {"aten.eq.Scalar", "aten.ge.Scalar"} <= made
    assert not [name for name in made if "full" in name]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_narrow_integers_compare_with_any_number(dtype: torch.dtype) -> None:
    ids = torch.tensor([[1, 2, 100, 4]], dtype=dtype)
    program = parse("(t0[b, kv] <= 300) & (-300 < t0[b, kv])", 4, tensors=(ids,))
    kv = torch.arange(4)
    assert bool(program.evaluate(kv * 0, kv, kv).all())
