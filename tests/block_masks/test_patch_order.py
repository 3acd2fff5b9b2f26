"""Tile order is a permutation whose blocks are tiles."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.block_masks import PatchOrder, UniSparse
from unisparse_flex.block_masks.selectors import DenseSpan, StreamingLLM


@st.composite
def orders(draw: st.DrawFn) -> PatchOrder:
    axes = draw(st.sampled_from([2, 3]))

    def sizes(most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(1, most)) for _ in range(axes))

    cell = sizes(3)
    tile = tuple(c * draw(st.integers(1, 3)) for c in cell)
    return PatchOrder(
        grid=sizes(13),
        tile=tile,
        cell=draw(st.sampled_from([None, cell])),
        text_before=draw(st.integers(0, 5)),
        text_after=draw(st.integers(0, 5)),
    )


def by_sorting(order: PatchOrder) -> list[int]:
    """Raster positions in tile order, from the definition: sorted by what comes first."""
    cell = order.cell or order.tile

    def place(patch: tuple[int, ...]) -> tuple[Any, ...]:
        cut = []
        tiles = []
        cells = []
        inside = []
        for at, n, t, c in zip(patch, order.grid, order.tile, cell, strict=True):
            whole = n // t * t
            cut.append(at >= whole)
            length = t if at < whole else n - whole
            step = length if length % c else c
            tiles.append(at // t)
            cells.append(at % t // step)
            inside.append(at % t % step)
        return cut, tiles, cells, inside

    patches = list(itertools.product(*map(range, order.grid)))
    first = order.text_before
    numbered = sorted(range(len(patches)), key=lambda n: place(patches[n]))
    stop = first + len(patches)
    return [first + n for n in numbered] + [*range(first), *range(stop, stop + order.text_after)]


@given(orders())
@example(PatchOrder(grid=(1, 1), tile=(8, 16)))
@example(PatchOrder(grid=(5, 1), tile=(4, 4)))
@example(PatchOrder(grid=(7, 3), tile=(4, 4), cell=(2, 2), text_before=1))
@example(PatchOrder(grid=(17, 9, 5), tile=(2, 4, 4), cell=(2, 2, 2), text_after=3))
def test_it_is_the_order_that_is_defined_and_restore_its_inverse(order: PatchOrder) -> None:
    permutation, inverse = order.permutation(), order.inverse()
    assert permutation.dtype is inverse.dtype is torch.int64
    assert permutation.tolist() == by_sorting(order)
    assert permutation[inverse].equal(torch.arange(order.num_tokens))
    assert inverse[permutation].equal(torch.arange(order.num_tokens))


@given(orders(), st.integers(-3, 2))
@example(PatchOrder(grid=(17, 9, 5), tile=(2, 4, 4), text_before=2, text_after=3), 1)
def test_any_dimension_is_permuted_by_the_same_indices(order: PatchOrder, dim: int) -> None:
    shape = [2, 3, 4]
    shape[dim] = order.num_tokens
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    permuted = order.permute(tensor, dim)
    assert permuted.equal(tensor.index_select(dim, order.permutation()))
    assert order.restore(permuted, dim).equal(tensor)
    assert order.restore(tensor, dim).equal(tensor.index_select(dim, order.inverse()))


def coordinates(order: PatchOrder) -> Tensor:
    """Of the patches in tile order: int64 [patches, axes]."""
    axes = torch.meshgrid(*map(torch.arange, order.grid), indexing="ij")
    patches = order.permutation()[: order.num_patches] - order.text_before
    return torch.stack([axis.flatten() for axis in axes], -1)[patches]


@pytest.mark.parametrize(
    ("grid", "tile", "cell"),
    [
        ((4, 16, 24), (2, 8, 8), None),
        ((4, 16, 24), (4, 4, 8), (2, 2, 2)),
        ((16, 32), (8, 16), (4, 4)),
        ((5, 17, 27), (2, 8, 8), (2, 2, 2)),
        ((21, 30, 52), (4, 4, 8), None),
    ],
)
def test_every_block_of_whole_tiles_is_one_tile(
    grid: tuple[int, ...], tile: tuple[int, ...], cell: tuple[int, ...] | None
) -> None:
    order = PatchOrder(grid=grid, tile=tile, cell=cell, text_before=77)
    size = math.prod(tile)
    corners = list(
        itertools.product(*(range(0, n // t * t, t) for n, t in zip(grid, tile, strict=True)))
    )
    blocks = coordinates(order)[: len(corners) * size].unflatten(0, (-1, size))
    assert blocks.amin(1).tolist() == [list(corner) for corner in corners]
    assert (blocks.amax(1) - blocks.amin(1) + 1).tolist() == [list(tile)] * len(corners)
    if cell is not None:
        groups = blocks.unflatten(1, (-1, math.prod(cell)))
        extent = groups.amax(2) - groups.amin(2) + 1
        assert (extent == torch.tensor(cell)).all()


def test_small_tiles_fill_a_block_together() -> None:
    order = PatchOrder(grid=(8, 16), tile=(4, 4))
    assert order.keep_text(UniSparse(block_size=32)) == UniSparse(block_size=32)
    first = coordinates(order)[:32]
    assert first.amax(0).tolist() == [3, 7]


def test_text_keeps_its_order_behind_the_patches() -> None:
    order = PatchOrder(grid=(2, 3), tile=(2, 2), text_before=2, text_after=1)
    assert order.permutation().tolist() == [2, 3, 5, 6, 4, 7, 0, 1, 8]


def test_gradients_are_permuted_back() -> None:
    order = PatchOrder(grid=(3, 5), tile=(2, 2), text_before=2)
    tensor = torch.randn(1, order.num_tokens, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(order.permute, (tensor,))
    assert torch.autograd.gradcheck(order.restore, (tensor,))


def test_text_is_kept_by_blocks_of_rows_and_of_keys() -> None:
    order = PatchOrder(grid=(6, 16), tile=(4, 4), text_before=20)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, order.num_tokens, 4, generator=generator)
    inner = UniSparse(block_size=16, c_q=4, c_k=4, top_k=1, sink_blocks=0, last_query_blocks=0)
    alone = inner.select(query, key).keep
    # 96 patches in blocks 0 to 5, 20 tokens of text in blocks 6 and 7.
    text = torch.arange(8) >= 6
    for rows, keys in itertools.product([True, False], repeat=2):
        keep = order.keep_text(inner, rows=rows, keys=keys).select(query, key).keep
        assert keep.equal(alone | (text[:, None] & rows) | (text & keys))
    assert alone.float().mean() < 0.2


def test_a_block_with_one_token_of_the_span_is_the_spans() -> None:
    query = key = torch.randn(1, 1, 64, 4)
    inner = StreamingLLM(block_size=16, sink_tokens=0, local_tokens=1)
    for tokens, blocks in [("31:33", {1, 2}), ("16:32", {1}), ("0:1", {0}), ("63:900", {3})]:
        keep = DenseSpan(selector=inner, tokens=tokens, rows=False).select(query, key).keep[0, 0]
        assert {i for i in range(4) if keep[:, i].all()} == blocks


def test_under_causality_only_what_is_visible_is_kept() -> None:
    query = key = torch.randn(1, 1, 64, 4)
    inner = StreamingLLM(block_size=16, sink_tokens=0, local_tokens=1)
    selection = DenseSpan(selector=inner, tokens="16:32").select(query, key, is_causal=True)
    kept = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    assert selection.keep[0, 0].int().tolist() == kept


def test_the_span_is_only_where_queries_and_keys_are_the_same_tokens() -> None:
    selector = DenseSpan(selector=UniSparse(), tokens="0:5")
    calls: dict[str, bool] = {"causal": False, "masked": False}
    assert selector.supports(**calls, self_attention=True)
    assert not selector.supports(**calls, self_attention=False)
    with pytest.raises(ValueError, match="as many queries as keys, got q_len 8 and kv_len 9"):
        selector.select(torch.randn(1, 1, 8, 4), torch.randn(1, 1, 9, 4))


def test_the_cost_counts_the_blocks_of_the_span() -> None:
    inner = UniSparse(block_size=128)
    cost = DenseSpan(selector=inner, tokens="300:400", rows=False).cost
    assert cost.row_blocks == inner.cost.row_blocks + 2
    assert cost.last_query_blocks == inner.cost.last_query_blocks


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"grid": [4, 4]}, TypeError, r"grid must be a tuple of ints, .*, got \[4, 4\] of type li"),
        ({"grid": (4,)}, ValueError, r"grid must have 2 or 3 axes, .*, got \(4,\); one axis"),
        ({"grid": (4, 0)}, ValueError, r"grid\[1\] must be at least 1, got 0"),
        ({"grid": (4, 2.0)}, TypeError, r"grid\[1\] must be an int, got 2.0"),
        ({"tile": 4}, TypeError, r"tile must be a tuple of ints"),
        ({"tile": (2, 2, 2)}, ValueError, r"tile must have as many axes as grid \(4, 4\), got"),
        ({"tile": (2, -2)}, ValueError, r"tile\[1\] must be at least 1, got -2"),
        ({"cell": (2, 3)}, ValueError, r"cell must divide tile \(4, 4\) along every axis, got"),
        ({"cell": (2, 2, 2)}, ValueError, r"cell must have as many axes as grid"),
        ({"text_before": -1}, ValueError, r"text_before must be at least 0, got -1"),
        ({"text_after": 1.5}, TypeError, r"text_after must be an int, got 1.5"),
    ],
)
def test_bad_orders_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PatchOrder(**({"grid": (4, 4), "tile": (4, 4)} | arguments))


def test_what_is_permuted_must_be_of_the_sequence() -> None:
    order = PatchOrder(grid=(4, 4), tile=(4, 4), text_before=3)
    for method in (order.permute, order.restore):
        with pytest.raises(ValueError, match=r"hold 19 tokens along dim -2 .* got shape \[1, 16, "):
            method(torch.zeros(1, 16, 8))
        with pytest.raises(ValueError, match=r"dim must be one of the 3 dimensions .*, got 3"):
            method(torch.zeros(1, 19, 8), 3)
        with pytest.raises(TypeError, match=r"tensor must be a torch.Tensor, got list"):
            method([1])  # type: ignore[arg-type]


def test_a_tile_that_does_not_divide_the_block_is_named() -> None:
    order = PatchOrder(grid=(4, 8, 8), tile=(2, 8, 8))
    with pytest.raises(ValueError, match=r"block_size 64, got \(2, 8, 8\) of 128 patches; use"):
        order.keep_text(UniSparse(block_size=64))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"selector": "UniSparse()"}, TypeError, "selector must be a selector such as"),
        ({"tokens": (0, 5)}, TypeError, 'tokens must be a text "first:stop", got'),
        ({"tokens": "5"}, ValueError, "0 <= first < stop, got '5'"),
        ({"tokens": "5:5"}, ValueError, "got '5:5'; where there are none"),
        ({"tokens": "-5:5"}, ValueError, "got '-5:5'"),
        ({"tokens": "0:5:9"}, ValueError, "got '0:5:9'"),
        ({"rows": 1}, TypeError, "rows must be True or False, got 1"),
        ({"keys": None}, TypeError, "keys must be True or False, got None"),
    ],
)
def test_bad_spans_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        DenseSpan(**(dict[str, Any](selector=UniSparse(), tokens="0:5") | arguments))
