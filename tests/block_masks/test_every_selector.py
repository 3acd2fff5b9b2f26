"""What holds for every selector: forced blocks, batches, GQA, masks, padding, compilation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from unisparse_flex.block_masks import BlockGeometry, Selector
from unisparse_flex.block_masks.masks import MaskProgram
from unisparse_flex.block_masks.scoring import default_scale
from unisparse_flex.block_masks.selectors import FlashPrefill, XAttention

from . import oracle
from .baselines import BY_SCORES, SELECTORS, SIZE, calls_of, name
from .strategies import HEAD_DIM, Call
from .test_padding import padding_mask

every_selector = pytest.mark.parametrize("selector", SELECTORS, ids=name)
by_scores = pytest.mark.parametrize("selector", BY_SCORES, ids=name)
sides = pytest.mark.parametrize("side", ["left", "right"])
CPU = torch.device("cpu")


def square(selector: Selector, length: int = 50, *, causal: bool = False) -> Call:
    return replace(calls_of(selector)[0], q_len=length, kv_len=length, causal=causal)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_selector
def test_no_row_is_empty_and_nothing_invisible_is_kept(selector: Selector) -> None:
    for call in calls_of(selector):
        selection = call.select()
        pairs = oracle.visible_pairs(call.q_len, call.kv_len, call.offset)
        assert selection.keep.shape[-2:] == (-(-call.q_len // SIZE), -(-call.kv_len // SIZE))
        assert not (selection.keep & ~oracle.any_in_block(pairs, SIZE)).any()
        tokens = selection.token_mask()
        assert tokens.any(-1).all()
        if call.offset is not None:
            assert tokens.diagonal(call.offset, -2, -1).all()


@every_selector
def test_an_element_of_a_batch_is_selected_as_alone(selector: Selector) -> None:
    for call in calls_of(selector)[::3]:
        query, key = call.query_key()
        together = call.keep()
        for b in range(call.batch):
            one = slice(b, b + 1)
            assert call.keep(query[one], key[one]).equal(together[one])


@every_selector
def test_heads_of_a_group_are_selected_as_with_keys_of_their_own(selector: Selector) -> None:
    for call in calls_of(selector)[::3]:
        query, key = call.query_key()
        repeated = key.repeat_interleave(call.group, dim=1)
        assert call.keep(query, repeated).equal(call.keep())


@every_selector
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_selects_as_its_float32_upcast(
    selector: Selector, dtype: torch.dtype
) -> None:
    for call in calls_of(selector)[::5]:
        query, key = (tokens.to(dtype) for tokens in call.query_key())
        assert call.keep(query, key).equal(call.keep(query.float(), key.float()))


@by_scores
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_query_that_is_not_finite_keeps_all_its_block_sees(
    selector: Selector, value: float
) -> None:
    for call in calls_of(selector)[::4]:
        query, key = call.query_key()
        row = call.q_len // 2
        query[1, 2, row, 1] = value
        expected = call.keep().clone()
        expected[1, 2, row // SIZE] = call.geometry.visible_blocks(CPU)[row // SIZE]
        assert call.keep(query, key).equal(expected)


@by_scores
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_key_that_is_not_finite_keeps_all_for_those_who_see_it(
    selector: Selector, value: float
) -> None:
    for call in calls_of(selector)[::4]:
        query, key = call.query_key()
        token = call.kv_len // 2
        key[1, 0, token, 1] = value
        before, after = call.keep(), call.keep(query, key)
        pairs = oracle.visible_pairs(call.q_len, call.kv_len, call.offset)
        visible = call.geometry.visible_blocks(CPU)
        sees = torch.tensor([bool(rows.any()) for rows in pairs[:, token].split(SIZE)])
        near = visible[:, token // SIZE]
        assert after[1, :2, sees].equal(visible[sees].expand(2, -1, -1))
        assert after[1, :2, ~near].equal(before[1, :2, ~near])
        assert after[0].equal(before[0])
        assert after[1, 2:].equal(before[1, 2:])


@pytest.mark.parametrize("kept", range(1, 9))
@by_scores
def test_constant_logits_keep_the_lowest_blocks(selector: Selector, kept: int) -> None:
    if isinstance(selector, FlashPrefill):
        pytest.skip("equal scores are all kept, see test_flash_prefill")
    selector = replace(selector, top_p=kept / 8)
    keep = selector.select(torch.ones(2, 2, 3 * SIZE, 4), torch.ones(2, 1, 8 * SIZE, 4)).keep
    assert keep.equal((torch.arange(8) < kept).expand(2, 2, 3, 8))


@by_scores
@pytest.mark.parametrize("column", range(8))
def test_one_hot_logits_keep_that_block_alone(selector: Selector, column: int) -> None:
    query = torch.ones(1, 2, 3 * SIZE, 4)
    key = torch.zeros(1, 1, 8 * SIZE, 4)
    key[:, :, column * SIZE : (column + 1) * SIZE] = 100.0
    expected = (torch.arange(8) == column).expand(1, 2, 3, 8)
    assert selector.select(query, key).keep.equal(expected)


@every_selector
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("length", [1, 16, 31, 48, 50])
def test_a_causal_mask_selects_as_is_causal(
    selector: Selector, length: int, additive: bool
) -> None:
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    spelled = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if additive else mask
    by_mask = square(selector, length).select(attn_mask=spelled)
    by_flag = square(selector, length, causal=True).select()
    assert by_mask.keep.equal(by_flag.keep)
    assert by_mask.visible.expand_as(by_flag.visible).equal(by_flag.visible)


@every_selector
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
def test_under_a_mask_rows_keep_a_key_and_nothing_hidden(
    selector: Selector, heads: int, density: float
) -> None:
    call = square(selector)
    shape = (2, heads, call.q_len, call.kv_len)
    mask = torch.rand(shape, generator=call.generator()) < density
    selection = call.select(attn_mask=mask)
    kept = selection.token_mask() & mask
    assert (kept.any(-1) | ~mask.any(-1)).all()
    blocks = torch.stack(
        [torch.stack([oracle.any_in_block(head, SIZE) for head in element]) for element in mask]
    )
    assert not (selection.keep & ~blocks).any()
    minimum = torch.finfo(torch.float32).min
    by_float = call.select(attn_mask=torch.zeros(shape).masked_fill(~mask, minimum))
    assert by_float.keep.equal(selection.keep)


@by_scores
def test_a_bias_that_makes_a_block_dominant_selects_it(selector: Selector) -> None:
    call = square(selector)
    for i in range(4):
        for j in range(4):
            bias = torch.zeros(call.q_len, call.kv_len)
            bias[i * SIZE : (i + 1) * SIZE, j * SIZE : (j + 1) * SIZE] = 100.0
            assert call.select(attn_mask=bias).keep[:, :, i, j].all()


def ragged(side: str, length: int) -> Tensor:
    """Valid tokens [2, S]: 23 tokens of the first element and 50 of the second."""
    valid = torch.arange(length)[None, :] < torch.tensor([23, 50])[:, None]
    return valid if side == "right" else valid.flip(-1)


@every_selector
@sides
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("garbage", [1e5, math.nan, math.inf])
def test_padded_tokens_may_hold_anything(
    selector: Selector, side: str, causal: bool, garbage: float
) -> None:
    call = square(selector, 61)
    valid = ragged(side, 61)
    mask = padding_mask(valid, causal=causal)
    padding = ~valid[:, None, :, None]
    query, key = (tokens.masked_fill(padding, garbage) for tokens in call.query_key())
    clean, spoilt = call.select(attn_mask=mask), call.select(query, key, attn_mask=mask)
    assert spoilt.keep.equal(clean.keep)
    for b in range(2):
        real = torch.tensor([bool(part.any()) for part in valid[b].split(SIZE)])
        assert not clean.keep[b, :, ~real].any()
        assert not clean.keep[b, :, :, ~real].any()


@every_selector
@sides
@pytest.mark.parametrize("causal", [False, True])
def test_padding_by_whole_blocks_moves_the_selection_and_nothing_else(
    selector: Selector, side: str, causal: bool
) -> None:
    call = square(selector)
    extra = (2 * SIZE, 0) if side == "left" else (0, 2 * SIZE)
    query, key = (
        torch.nn.functional.pad(tokens, (0, 0, *extra), value=math.nan)
        for tokens in call.query_key()
    )
    alone = torch.ones(2, call.q_len, dtype=torch.bool)
    valid = torch.nn.functional.pad(alone, extra)
    padded = square(selector, call.q_len + 2 * SIZE).select(
        query, key, attn_mask=padding_mask(valid, causal=causal)
    )
    expected = call.select(attn_mask=padding_mask(alone, causal=causal)).keep
    blocks = tuple(count // SIZE for count in extra)
    assert padded.keep.equal(torch.nn.functional.pad(expected, blocks * 2))


@every_selector
@sides
@pytest.mark.parametrize("causal", [False, True])
def test_a_formula_selects_as_the_mask_that_it_stands_for(
    selector: Selector, side: str, causal: bool
) -> None:
    call = square(selector, causal=causal)
    valid = ragged(side, 50)
    program = MaskProgram.parse("t0[b, kv]", tensors=[valid], batch=2, q_len=50, kv_len=50)
    geometry = BlockGeometry(
        q_len=50, kv_len=50, block_size=SIZE, causal_offset=call.offset, mask=program
    )
    by_formula = selector.compute_selection(
        *call.query_key(), geometry=geometry, scale=default_scale(HEAD_DIM), attn_mask=None
    )
    mask = valid[:, None, None, :].expand(2, 1, 50, 50)
    by_mask = square(selector).select(attn_mask=mask.tril() if causal else mask)
    visible = by_mask.visible
    assert (by_formula.keep & visible).equal(by_mask.keep)


@pytest.mark.parametrize("selector", SELECTORS[1:], ids=name)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.usefixtures("fresh_dynamo")
def test_it_is_traced_whole_for_lengths_that_vary(selector: Selector, causal: bool) -> None:
    def select(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        selection = selector.select(query, key, causal_lower_right=causal)
        return selection.keep, selection.visible

    compiled = torch.compile(select, fullgraph=True, dynamic=True, backend="aot_eager")
    ahead = 19 if causal else 0
    for length in (50, 71):
        call = replace(square(selector, length, causal=causal), kv_len=length + ahead)
        query, key = call.query_key()
        eager, traced = select(query, key), compiled(query, key)
        assert traced[0].equal(eager[0])
        assert traced[1].equal(eager[1])


@pytest.mark.usefixtures("fresh_dynamo")
def test_thresholds_of_heads_are_traced_too() -> None:
    selector = XAttention(block_size=SIZE, stride=4, head_top_p=(0.3, 0.5, 0.7, 1.0))
    call = calls_of(selector)[-1]
    compiled = torch.compile(selector.select, fullgraph=True, dynamic=True, backend="aot_eager")
    assert compiled(*call.query_key()).keep.equal(call.keep())


@every_selector
def test_it_can_be_written_and_read_back(selector: Selector) -> None:
    assert eval(selector.text, dict(Selector.registry)) == selector
    assert 0 < selector.cost.density(q_len=512, kv_len=512, block_size=SIZE, is_causal=True) <= 1
