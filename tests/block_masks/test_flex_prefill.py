"""FlexPrefill's heads are query-aware or vertical-slash, and keep what the definition says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unisparse_flex import attention
from unisparse_flex.block_masks import BlockGeometry, Selector
from unisparse_flex.block_masks.selectors import FlexPrefill

from . import last_queries_oracle as oracle
from .last_queries_oracle import tokens

SIZE = 16
SMALL = FlexPrefill(block_size=SIZE, top_p=0.6, min_budget=0, last_query_blocks=0)
LINES, MAP = replace(SMALL, tau=0), replace(SMALL, tau=1)
MIXED = replace(SMALL, tau=0.25)
SELECTORS = [
    LINES,
    MAP,
    MIXED,
    replace(LINES, top_p=0.9, min_budget=40, last_query_blocks=1),
    replace(MAP, top_p=0.9, sink_blocks=0, local_blocks=2),
]


def means(head: Tensor, size: int) -> list[Tensor]:
    return [block.mean(0) for block in head.split(size)]


def pooled_row(query: Tensor, key: Tensor, last_position: int, size: int) -> list[float]:
    """Attention of one mean query [D] over the means of the key blocks up to a position."""
    counts = [len(block) for block in key.split(size)]
    seen = [j for j in range(len(counts)) if j * size <= last_position]
    pooled = means(key, size)
    scale = 1 / math.sqrt(len(query))
    logits = [float(pooled[j] @ query) * scale + math.log(counts[j] / size) for j in seen]
    return oracle.softmax(logits) + [0.0] * (len(counts) - len(seen))


def head_distance(query: Tensor, key: Tensor, size: int) -> float:
    columns, _ = oracle.column_and_diagonal_mass(query, key, size)
    true = [sum(columns[n : n + size]) for n in range(0, len(key), size)]
    guess = pooled_row(query[-size:].mean(0), key, len(key) - 1, size)
    divergence = 0.0
    for p, q in zip(true, guess, strict=True):
        for part in (p, q):
            divergence += part * math.log(part / ((p + q) / 2)) / 2 if part > 0 else 0.0
    return math.sqrt(max(0.0, divergence))


def chosen_blocks(mass: list[float], selector: FlexPrefill) -> set[int]:
    size, total, count = selector.block_size, 0.0, 0
    for share in sorted(mass, reverse=True):
        total += share
        count += total <= selector.top_p
    blocks = [sum(mass[n : n + size]) for n in range(0, len(mass), size)]
    most = max(1 + count // size, -(-selector.min_budget // size))
    return {0} | oracle.highest(blocks, most, 0)


def vertical_slash(query: Tensor, key: Tensor, selector: FlexPrefill) -> set[tuple[int, int]]:
    size = selector.block_size
    columns, diagonals = oracle.column_and_diagonal_mass(query, key, size)
    tokens_of = {j * size + n for j in chosen_blocks(columns, selector) for n in range(size)}
    distances = {u * size for u in chosen_blocks(diagonals, selector)}
    return oracle.blocks_on_lines(tokens_of, distances, len(query), len(key), size)


def query_aware(
    query: Tensor,
    key: Tensor,
    selector: FlexPrefill,
    forced: set[tuple[int, int]],
    visible: set[tuple[int, int]],
) -> set[tuple[int, int]]:
    size, offset = selector.block_size, len(key) - len(query)
    scores = {}
    for i, mean in enumerate(means(query, size)):
        last = min((i + 1) * size, len(query)) - 1 + offset
        for j, share in enumerate(pooled_row(mean, key, last, size)):
            scores[i, j] = share
    kept = forced & visible
    mass = sum(scores[cell] for cell in kept)
    goal = selector.top_p * -(-len(query) // size)
    for cell in sorted(visible - kept, key=lambda cell: (-scores[cell], cell)):
        if mass >= goal:
            break
        kept.add(cell)
        mass += scores[cell]
    return kept


def expected(query: Tensor, key: Tensor, selector: FlexPrefill) -> Tensor:
    """bool [B, Hq, Nq, Nk] by the definition."""
    size, (q_len, kv_len) = selector.block_size, (query.shape[2], key.shape[2])
    forced, visible = oracle.forced_and_visible(selector.forced_blocks, q_len, kv_len, size)

    def one(head_query: Tensor, head_key: Tensor, _: int) -> oracle.Rows:
        if kv_len <= max(2 * size, selector.min_budget):
            kept = visible
        elif head_distance(head_query, head_key, size) < selector.tau:
            kept = query_aware(head_query, head_key, selector, forced, visible)
        else:
            kept = (vertical_slash(head_query, head_key, selector) | forced) & visible
        return oracle.as_rows(kept, q_len, kv_len, size)

    return oracle.per_head(query, key, one)


def keep(selector: FlexPrefill, query: Tensor, key: Tensor) -> Tensor:
    return selector.select(query, key, causal_lower_right=True).keep


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 47, 48, 49, 64, 65, 127, 129])
def test_self_attention_selects_by_the_definition(selector: FlexPrefill, length: int) -> None:
    query, key = tokens(length, 2, 4, length, 4), tokens(length + 1, 2, 2, length, 4)
    assert keep(selector, query, key).equal(expected(query, key, selector))


@pytest.mark.parametrize("q_len", [1, 7, 16, 17, 48, 50])
@pytest.mark.parametrize("residue", range(SIZE))
def test_every_offset_selects_by_the_definition(residue: int, q_len: int) -> None:
    query, key = tokens(residue, 1, 4, q_len, 4), tokens(99, 1, 2, q_len + 32 + residue, 4)
    for selector in SELECTORS[:3]:
        assert keep(selector, query, key).equal(expected(query, key, selector))


def test_heads_of_both_kinds_stand_side_by_side() -> None:
    query, key = tokens(1, 4, 8, 127, 4), tokens(2, 4, 2, 127, 4)
    query[:, ::2] *= 0.1
    distances = [
        head_distance(query[b, h], key[b, h // 4], SIZE) for b in range(4) for h in range(8)
    ]
    aware = torch.tensor([d < MIXED.tau for d in distances]).view(4, 8, 1, 1)
    assert 0 < aware.sum() < 32
    by_kind = torch.where(aware, keep(MAP, query, key), keep(LINES, query, key))
    assert keep(MIXED, query, key).equal(by_kind)


@pytest.mark.parametrize("offset", [0, 3, 16])
@pytest.mark.parametrize("selector", [LINES, MAP])
def test_top_left_alignment_leaves_no_row_without_keys(selector: FlexPrefill, offset: int) -> None:
    query, key = tokens(1, 1, 2, 70, 4), tokens(2, 1, 1, 40, 4)
    geometry = BlockGeometry(q_len=70, kv_len=40, block_size=SIZE, causal_offset=offset)
    selection = selector.compute_selection(query, key, geometry=geometry, scale=0.5, attn_mask=None)
    assert selection.token_mask().any(-1).all()
    assert not (selection.keep & ~selection.visible).any()


@pytest.mark.parametrize("j", range(8))
@pytest.mark.parametrize("selector", [LINES, MAP])
def test_a_planted_key_block_is_kept_for_all_later_rows(selector: FlexPrefill, j: int) -> None:
    query, key = tokens(1, 1, 2, 8 * SIZE, 8), tokens(2, 1, 1, 8 * SIZE, 8)
    query[..., 0], key[..., 0] = 10.0, 0.0
    key[:, :, j * SIZE : (j + 1) * SIZE, 0] = 10.0
    assert keep(replace(selector, top_p=0.95), query, key)[:, :, j:, j].all()


@pytest.mark.parametrize("i", range(8))
def test_a_planted_block_of_one_row_is_kept_by_a_query_aware_head(i: int) -> None:
    for j in range(i + 1):
        query, key = tokens(1, 1, 2, 8 * SIZE, 8), tokens(2, 1, 1, 8 * SIZE, 8)
        query, key[..., 0] = 0.1 * query, 0.0
        query[:, :, i * SIZE : (i + 1) * SIZE, 0] = 10.0
        key[:, :, j * SIZE : (j + 1) * SIZE, 0] = 10.0
        assert keep(replace(MAP, top_p=0.9), query, key)[:, :, i, j].all()


@pytest.mark.parametrize("distance", [0, 1, 3, 5])
@pytest.mark.parametrize("offset", [0, 5, 16])
def test_a_planted_diagonal_is_kept_for_all_rows(distance: int, offset: int) -> None:
    """Of a block of distances, the one that is a multiple of the block size is followed."""
    length, back = 8 * SIZE, distance * SIZE
    key = F.normalize(tokens(3, 1, 1, length + offset, 64), dim=-1)
    query = 300 * key.roll(back, 2)[:, :, offset:]
    mask = LINES.select(query, key, causal_lower_right=True).token_mask()
    for row in range(max(0, back - offset), length):
        assert mask[0, 0, row, row + offset - back]


@pytest.mark.parametrize("selector", [LINES, MAP])
@pytest.mark.parametrize("top_p", [0.05, 0.33, 0.61, 0.87])
def test_constant_logits_select_by_the_definition(selector: FlexPrefill, top_p: float) -> None:
    zeros = torch.zeros(2, 2, 7 * SIZE, 4, dtype=torch.float64)
    selector = replace(selector, top_p=top_p)
    assert keep(selector, zeros, zeros).equal(expected(zeros, zeros, selector))


def test_constant_logits_keep_the_lowest_columns_and_the_nearest_diagonals() -> None:
    zeros = torch.zeros(1, 1, 8 * SIZE, 4)
    kept = keep(replace(LINES, top_p=1e-6, min_budget=3 * SIZE), zeros, zeros)[0, 0]
    for i in range(8):
        assert kept[i].nonzero().flatten().tolist() == sorted(
            {j for j in (0, 1, 2, i, i - 1, i - 2) if 0 <= j <= i}
        )


def test_ties_in_the_map_go_to_the_lower_row() -> None:
    query, key = torch.ones(1, 1, 8 * SIZE, 4), torch.zeros(1, 1, 8 * SIZE, 4)
    key[:, :, 2 * SIZE : 3 * SIZE] = 100.0
    # Rows 0 to 2 hold one forced block of mass 1 or blocks of mass 1/2; block 2 is all of the rest.
    kept = keep(replace(MAP, top_p=5 / 8), query, key)[0, 0]
    assert kept[:, 2].tolist() == [False, False, True, True, True, False, False, False]


@pytest.mark.parametrize("selector", [LINES, MAP, FlexPrefill(block_size=SIZE)])
def test_gamma_of_one_or_few_keys_keep_everything(selector: FlexPrefill) -> None:
    query, key = tokens(1, 1, 4, 70, 4), tokens(2, 1, 2, 103, 4)
    budget = selector.min_budget > 0
    changed = selector if budget else replace(selector, top_p=1.0)
    selection = changed.select(query, key, causal_lower_right=True)
    assert selection.keep.equal(selection.visible.expand_as(selection.keep))


def test_a_batch_element_alone_is_selected_as_in_the_batch() -> None:
    query, key = tokens(1, 3, 4, 77, 4), tokens(2, 3, 2, 100, 4)
    together = keep(MIXED, query, key)
    for b in range(3):
        assert keep(MIXED, query[b : b + 1], key[b : b + 1]).equal(together[b : b + 1])


@pytest.mark.parametrize("selector", [LINES, MAP, MIXED])
def test_shared_keys_select_as_repeated_ones(selector: FlexPrefill) -> None:
    query, key = tokens(1, 1, 6, 77, 4), tokens(2, 1, 2, 100, 4)
    assert keep(selector, query, key).equal(keep(selector, query, key.repeat_interleave(3, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("selector", [LINES, MAP])
def test_half_precision_selects_as_its_float32_upcast(
    selector: FlexPrefill, dtype: torch.dtype
) -> None:
    query, key = (tokens(n, 1, 2, 100, 4).to(dtype) for n in range(2))
    assert keep(selector, query, key).equal(keep(selector, query.float(), key.float()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("selector", [LINES, MAP])
def test_what_is_not_finite_keeps_all_that_it_touches(selector: FlexPrefill, value: float) -> None:
    query, key = tokens(1, 2, 4, 100, 4), tokens(2, 2, 2, 100, 4)
    clean = keep(selector, query, key)
    visible = selector.select(query, key, is_causal=True).visible[0, 0]
    spoilt_query, spoilt_key = query.clone(), key.clone()
    spoilt_query[1, 2, 40, 0], spoilt_key[0, 1, 70, 3] = value, value
    after = keep(selector, spoilt_query, spoilt_key)
    assert after[0, 2:].equal(visible.expand(2, -1, -1))
    assert after[1, 2, 2].equal(visible[2])
    assert after[0, :2].equal(clean[0, :2])
    assert after[1, [0, 1, 3]].equal(clean[1, [0, 1, 3]])


def test_attention_over_the_selection_is_masked_attention() -> None:
    query, key = (tokens(n, 1, 4, 100, 8).float() for n in range(2))
    mask = MIXED.select(query, key, is_causal=True).token_mask()
    sparse = F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
    own = attention(query, key, key, is_causal=True, selector=MIXED)
    torch.testing.assert_close(own, sparse)


@pytest.mark.parametrize("selector", [MIXED])
def test_it_compiles_without_a_graph_break(selector: FlexPrefill) -> None:
    def select(query: Tensor, key: Tensor) -> Tensor:
        return selector.select(query, key, causal_lower_right=True).keep

    torch.compiler.reset()
    compiled = torch.compile(select, fullgraph=True, dynamic=True, backend="aot_eager")
    for q_len, kv_len in ((37, 150), (131, 140)):
        query, key = tokens(1, 2, 4, q_len, 4), tokens(2, 2, 2, kv_len, 4)
        assert compiled(query, key).equal(select(query, key))


@pytest.mark.parametrize("options", [{}, {"attn_mask": torch.ones(40, 40).tril().bool()}])
def test_calls_that_are_not_causal_or_masked_are_refused(options: dict[str, Any]) -> None:
    query = tokens(1, 1, 1, 40, 4)
    with pytest.raises(ValueError, match="FlexPrefill must have is_causal or causal"):
        SMALL.select(query, query, **options)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"block_size": 48}, ValueError, "block_size must be a power of two"),
        *[({"top_p": g}, ValueError, r"top_p must be in \(0, 1\]") for g in (0, 1.1)],
        ({"top_p": "1"}, TypeError, "top_p must be a number"),
        *[({"tau": t}, ValueError, r"tau must be in \[0, 1\]") for t in (-0.1, 1.1)],
        *[({"tau": t}, TypeError, "tau must be a number") for t in (False, "0")],
        ({"min_budget": -1}, ValueError, "min_budget must be at least 0"),
        ({"min_budget": 1.0}, TypeError, "min_budget must be an int"),
        ({"sink_blocks": -1}, ValueError, "sink_blocks must be at least 0"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FlexPrefill(**fields)


@pytest.mark.parametrize("selector", [FlexPrefill(), *SELECTORS])
def test_it_is_a_value(selector: FlexPrefill) -> None:
    assert eval(selector.text, {"FlexPrefill": FlexPrefill}) == selector
    assert hash(replace(selector)) == hash(selector)
    assert Selector.registry["FlexPrefill"] is FlexPrefill


def test_the_authors_settings_are_the_defaults() -> None:
    selector = FlexPrefill()
    assert (selector.top_p, selector.tau, selector.min_budget) == (0.9, 0.1, 1024)


def test_a_larger_gamma_is_expected_to_keep_more() -> None:
    found = [
        FlexPrefill(top_p=top_p).cost.density(
            q_len=32768, kv_len=32768, block_size=128, is_causal=True
        )
        for top_p in (0.8, 0.9, 0.95, 1.0)
    ]
    assert 0 < found[0] < found[1] < found[2] < found[3] == 1
