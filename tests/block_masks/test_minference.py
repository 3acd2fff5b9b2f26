"""MInference keeps the columns and diagonals that its last queries attend to most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unisparse_flex import attention
from unisparse_flex.block_masks import BlockGeometry, Selector
from unisparse_flex.block_masks.selectors import MInference

from . import last_queries_oracle as oracle
from .last_queries_oracle import tokens

SIZE = 16
SMALL = MInference(
    block_size=SIZE,
    vertical_slash=(6, 9),
    last_q=8,
    sink_tokens=2,
    local_tokens=3,
    last_query_blocks=0,
)
SELECTORS = [
    SMALL,
    replace(SMALL, vertical_slash=((0, 0), (1, 40), (500, 1), (9, 9)), last_query_blocks=1),
    replace(SMALL, vertical_slash=(3, 4), last_q=13, sink_blocks=0, local_blocks=2),
    replace(SMALL, vertical_slash=(5, 5), sink_tokens=0, local_tokens=0, last_q=64),
]


def expected(query: Tensor, key: Tensor, selector: MInference) -> Tensor:
    """bool [B, Hq, Nq, Nk] by the definition."""
    size, (q_len, kv_len) = selector.block_size, (query.shape[2], key.shape[2])

    def one(head_query: Tensor, head_key: Tensor, head: int) -> oracle.Rows:
        pair: Any = selector.vertical_slash
        vertical, slash = pair[head] if isinstance(pair[0], tuple) else pair
        columns, diagonals = oracle.column_and_diagonal_mass(head_query, head_key, selector.last_q)
        lines = oracle.blocks_on_lines(
            oracle.highest(columns, vertical, selector.sink_tokens),
            oracle.highest(diagonals, slash, selector.local_tokens),
            q_len,
            kv_len,
            size,
        )
        forced, visible = oracle.forced_and_visible(selector.forced_blocks, q_len, kv_len, size)
        return oracle.as_rows((lines | forced) & visible, q_len, kv_len, size)

    return oracle.per_head(query, key, one)


def keep(selector: MInference, query: Tensor, key: Tensor) -> Tensor:
    return selector.select(query, key, causal_lower_right=True).keep


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129])
def test_self_attention_selects_by_the_definition(selector: MInference, length: int) -> None:
    query, key = tokens(length, 2, 4, length, 4), tokens(length + 1, 2, 2, length, 4)
    assert keep(selector, query, key).equal(expected(query, key, selector))


@pytest.mark.parametrize("q_len", [1, 7, 16, 17, 48, 50])
@pytest.mark.parametrize("residue", range(SIZE))
def test_every_offset_selects_by_the_definition(residue: int, q_len: int) -> None:
    query, key = tokens(residue, 1, 4, q_len, 4), tokens(99, 1, 2, q_len + 32 + residue, 4)
    for selector in SELECTORS[:2]:
        assert keep(selector, query, key).equal(expected(query, key, selector))


@pytest.mark.parametrize("offset", [0, 3, 16])
def test_top_left_alignment_leaves_no_row_without_keys(offset: int) -> None:
    query, key = tokens(1, 1, 2, 70, 4), tokens(2, 1, 1, 40, 4)
    geometry = BlockGeometry(q_len=70, kv_len=40, block_size=SIZE, causal_offset=offset)
    selection = SMALL.compute_selection(query, key, geometry=geometry, scale=0.5, attn_mask=None)
    assert selection.token_mask().any(-1).all()
    assert not (selection.keep & ~selection.visible).any()


@pytest.mark.parametrize("column", [2, 15, 16, 40, 63, 95])
def test_a_planted_key_is_kept_for_all_later_rows(column: int) -> None:
    query, key = tokens(1, 1, 2, 130, 8), tokens(2, 1, 1, 130, 8)
    query[..., 0], key[..., 0] = 10.0, 0.0
    key[:, :, column, 0] = 10.0
    mask = replace(SMALL, vertical_slash=(3, 0)).select(query, key, is_causal=True).token_mask()
    assert mask[:, :, column:, column].all()


@pytest.mark.parametrize("distance", [3, 15, 16, 17, 40, 64])
def test_a_planted_diagonal_is_kept_for_all_rows(distance: int) -> None:
    length = 130
    key = F.normalize(tokens(3, 1, 1, length, 64), dim=-1)
    query = 300 * key.roll(distance, 2)
    mask = replace(SMALL, vertical_slash=(0, 4)).select(query, key, is_causal=True).token_mask()
    for row in range(distance, length):
        assert mask[0, 0, row, row - distance]


def test_constant_logits_keep_the_lowest_columns_and_the_nearest_diagonals() -> None:
    zeros = torch.zeros(2, 2, 8 * SIZE, 4)
    selector = replace(SMALL, sink_tokens=0, local_tokens=0)
    for vertical, blocks in ((1, 1), (16, 1), (17, 2), (48, 3)):
        kept = keep(replace(selector, vertical_slash=(vertical, 0)), zeros, zeros)
        for i in range(8):
            assert kept[1, 1, i].nonzero().flatten().tolist() == [*range(min(i, blocks)), i]
    for slash, blocks in ((1, 0), (2, 1), (17, 1), (18, 2), (33, 2)):
        changed = replace(selector, vertical_slash=(0, slash), sink_blocks=0)
        kept = keep(changed, zeros, zeros)
        for i in range(8):
            assert kept[1, 1, i].nonzero().flatten().tolist() == [*range(max(i - blocks, 0), i + 1)]


def test_ties_of_real_mass_go_to_the_lower_column() -> None:
    query = torch.ones(1, 1, 6 * SIZE, 4)
    key = torch.zeros(1, 1, 6 * SIZE, 4)
    key[:, :, 20], key[:, :, 40], key[:, :, 60] = 3.0, 3.0, 3.0
    changed = replace(SMALL, vertical_slash=(2, 0), sink_tokens=0, local_tokens=0)
    assert keep(changed, query, key)[0, 0, 5].nonzero().flatten().tolist() == [0, 1, 2, 5]


def test_sizes_beyond_the_length_keep_everything() -> None:
    query, key = tokens(1, 1, 4, 50, 4), tokens(2, 1, 2, 90, 4)
    selection = MInference(block_size=SIZE).select(query, key, causal_lower_right=True)
    assert selection.keep.equal(selection.visible.expand_as(selection.keep))


def test_a_batch_element_alone_is_selected_as_in_the_batch() -> None:
    query, key = tokens(1, 3, 4, 77, 4), tokens(2, 3, 2, 100, 4)
    together = keep(SELECTORS[1], query, key)
    for b in range(3):
        assert keep(SELECTORS[1], query[b : b + 1], key[b : b + 1]).equal(together[b : b + 1])


def test_shared_keys_select_as_repeated_ones() -> None:
    query, key = tokens(1, 1, 6, 77, 4), tokens(2, 1, 2, 100, 4)
    assert keep(SMALL, query, key).equal(keep(SMALL, query, key.repeat_interleave(3, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_selects_as_its_float32_upcast(dtype: torch.dtype) -> None:
    query, key = (tokens(n, 1, 2, 100, 4).to(dtype) for n in range(2))
    assert keep(SMALL, query, key).equal(keep(SMALL, query.float(), key.float()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_keeps_all_that_it_touches(value: float) -> None:
    query, key = tokens(1, 2, 4, 100, 4), tokens(2, 2, 2, 100, 4)
    clean = keep(SMALL, query, key).clone()
    visible = SMALL.select(query, key, is_causal=True).visible[0, 0]
    spoilt_query, spoilt_key = query.clone(), key.clone()
    spoilt_query[1, 2, 40, 0], spoilt_key[0, 1, 70, 3] = value, value
    clean[1, 2, 2], clean[0, 2:] = visible[2], visible
    assert keep(SMALL, spoilt_query, spoilt_key).equal(clean)


def test_attention_over_the_selection_is_masked_attention() -> None:
    query, key = (tokens(n, 1, 4, 100, 8).float() for n in range(2))
    mask = SMALL.select(query, key, is_causal=True).token_mask()
    sparse = F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
    own = attention(query, key, key, is_causal=True, selector=SMALL)
    torch.testing.assert_close(own, sparse)


@pytest.mark.parametrize("selector", SELECTORS[1:2])
def test_it_compiles_without_a_graph_break(selector: MInference) -> None:
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
    with pytest.raises(ValueError, match="MInference must have is_causal or causal"):
        SMALL.select(query, query, **options)


def test_pairs_for_other_heads_are_refused() -> None:
    query = tokens(1, 1, 3, 40, 4)
    with pytest.raises(ValueError, match=r"vertical_slash .* each of the 3 query heads, got 4"):
        SELECTORS[1].select(query, query, is_causal=True)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"block_size": 48}, ValueError, "block_size must be a power of two"),
        ({"last_q": 0}, ValueError, "last_q must be at least 1"),
        ({"sink_tokens": -1}, ValueError, "sink_tokens must be at least 0"),
        ({"local_tokens": 1.0}, TypeError, "local_tokens must be an int"),
        ({"local_blocks": 0}, ValueError, "local_blocks must be at least 1"),
        *[
            ({"vertical_slash": sizes}, TypeError, "vertical_slash must be")
            for sizes in (3, (), (1,), (1, 2, 3), ((1, 2), 3), [1, 2], (1.0, 2), ((1, "2"),))
        ],
        ({"vertical_slash": (1, -1)}, ValueError, "vertical_slash must be at least 0"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MInference(**fields)


@pytest.mark.parametrize("selector", [MInference(), *SELECTORS])
def test_it_is_a_value(selector: MInference) -> None:
    assert eval(selector.text, {"MInference": MInference}) == selector
    assert hash(replace(selector)) == hash(selector)
    assert Selector.registry["MInference"] is MInference


def test_the_authors_sizes_are_the_defaults() -> None:
    selector = MInference()
    assert selector.vertical_slash == (1000, 6096)
    assert (selector.last_q, selector.sink_tokens, selector.local_tokens) == (64, 30, 100)


def test_larger_sizes_are_expected_to_keep_more() -> None:
    found = [
        MInference(vertical_slash=pair).cost.density(
            q_len=32768, kv_len=32768, block_size=128, is_causal=True
        )
        for pair in ((100, 800), (1000, 6096), ((1000, 6096), (30, 8192)))
    ]
    assert 0 < found[0] < found[1] < 1
    assert 0 < found[2] < 1
