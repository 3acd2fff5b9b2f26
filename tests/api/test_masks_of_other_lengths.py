"""Compiled calls under masks, at a second length: a graph of symbolic lengths, or another graph.

Symbols: B batch, S tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, arange, nn

from unisparse_flex import UniSparse, optimize
from unisparse_flex.block_masks.geometry import BlockGeometry

HEADS, HEAD_DIM = 4, 16
LENGTHS = (512, 389)
LOWEST = torch.finfo(torch.float32).min


def causal(length: int, offset: int = 0) -> Tensor:
    return arange(length) <= arange(length)[:, None] + offset


def parts(length: int) -> Tensor:
    return arange(length) * 3 // length


def valid(batch: int, length: int) -> Tensor:
    """bool [B, S], padding on the left."""
    return arange(length) >= arange(batch)[:, None] * 50 + 7


def packed(batch: int, length: int) -> Tensor:
    starts = [arange(length) > 100 + 50 * b for b in range(batch)]
    return torch.stack([start[:, None] == start for start in starts])[:, None]


# Masks that a call is given, by batch and length.
GIVEN: dict[str, Callable[[int, int], Tensor]] = {
    "causal": lambda _, n: causal(n)[None, None],
    "documents": lambda _, n: causal(n) & (parts(n)[:, None] == parts(n)),
    "documents of each": lambda b, n: causal(n) & packed(b, n),
    "window": lambda _, n: causal(n) & ~causal(n, -150),
    "chunks": lambda _, n: causal(n) & (arange(n)[:, None] // 90 == arange(n) // 90),
    "prefix": lambda _, n: causal(n) | (arange(n) < 140),
    "padding": lambda b, n: (causal(n) & valid(b, n)[:, None, None]) | torch.eye(n).bool(),
    "padding of queries": lambda b, n: (
        causal(n) & valid(b, n)[:, None, None] & valid(b, n)[:, None, :, None]
    ),
    "encoder": lambda b, n: valid(b, n)[:, None, None],
    "holes": lambda _, n: causal(n) & ((arange(n) % 7 != 3) | (arange(n) < 2)),
    "added": lambda b, n: torch.zeros(b, 1, n, n).masked_fill(
        ~(causal(n) & valid(b, n)[:, None, None]), LOWEST
    ),
    "rows ahead": lambda _, n: causal(n, 31),
    "heads": lambda _, n: torch.stack([causal(n) & ~causal(n, -60 * h - 60) for h in range(HEADS)]),
    "random": lambda _, n: torch.rand(n, n) < 0.5,
}


def rows(query: Tensor) -> Tensor:
    return keys(query)[:, None]


def keys(query: Tensor) -> Tensor:
    return arange(query.shape[2], device=query.device)


def below(query: Tensor) -> Tensor:
    return keys(query) <= rows(query)


# Masks that are made inside, of the query and integers [B, S].
MADE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal, made": lambda q, _: below(q)[None, None],
    "padding, made": lambda q, i: below(q) & (i > 0)[:, None, None],
    "padding of both, made": lambda q, i: (
        below(q) & (i > 0)[:, None, None] & (i > 0)[:, None, :, None]
    ),
    "documents, made": lambda q, i: below(q) & (i[:, None, :, None] == i[:, None, None]),
    "documents counted, made": lambda q, i: (
        below(q) & (i.cumsum(-1)[:, None, :, None] == i.cumsum(-1)[:, None, None])
    ),
    "documents in chunks, made": lambda q, i: (
        below(q) & (keys(q) // 200 == rows(q) // 200) & (i[:, None, :, None] == i[:, None, None])
    ),
    "documents of the first, made": lambda q, i: below(q) & (i[0, :, None] == i[0]),
    "prefix, made": lambda q, i: below(q) | (keys(q) < i[:, -1:, None, None] * 90),
    "window, made": lambda q, _: below(q) & (rows(q) - keys(q) < 150),
    "window of a tensor, made": lambda q, i: (
        below(q) & (rows(q) - keys(q) < i.amax() * 90) & (keys(q) < i[:, -1:] + 300)[:, None, None]
    ),
    "two-sided window, made": lambda q, i: (
        ((rows(q) - keys(q)).abs() <= 150) & (i >= 0)[:, None, None]
    ),
    "images, made": lambda q, i: (
        below(q) | ((i[:, None, :, None] == i[:, None, None]) & (i > 1)[:, None, :, None])
    ),
    "lengths, made": lambda q, i: below(q) & (keys(q) < i[:, -1:] + 300)[:, None, None],
    "triangle, made": lambda q, i: (rows(q) + keys(q) <= q.shape[2] + 99) & (i >= 0)[:, None, None],
}


class Attend(nn.Module):
    """One attention call under a mask that it is given, or makes of integers."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.make = MADE.get(name)

    def forward(self, query: Tensor, key: Tensor, given: Tensor) -> Tensor:
        mask = given if self.make is None else self.make(query, given)
        return F.scaled_dot_product_attention(query, key, key, attn_mask=mask)


def arguments(name: str, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    shape = (batch, HEADS, length, HEAD_DIM)
    query, key = (torch.randn(shape, generator=generator) for _ in range(2))
    # Of padding, of which there is little, and of documents.
    ids = arange(length) * (3 + arange(batch)[:, None]) // length + (arange(length) >= 7)
    return query, key, GIVEN[name](batch, length).contiguous() if name in GIVEN else ids


# Each takes up to a minute: these two, and one of the others.
@pytest.mark.slow
@settings(max_examples=1, phases=(Phase.explicit, Phase.generate))
@example(name="documents", batch=1, dynamic=None)
@example(name="window of a tensor, made", batch=2, dynamic=True)
@given(
    name=st.sampled_from([*GIVEN, *MADE]),
    batch=st.integers(1, 2),
    dynamic=st.sampled_from([None, True]),
)
def test_a_compiled_call_is_right_at_a_second_length(
    name: str, batch: int, dynamic: bool | None
) -> None:
    torch._dynamo.reset()
    plain = Attend(name)
    compiled = torch.compile(
        optimize(Attend(name), UniSparse(top_p=1.0), min_length=0), dynamic=dynamic
    )
    for length in LENGTHS:
        given_arguments = arguments(name, batch, length)
        with torch.no_grad():
            found, expected = compiled(*given_arguments), plain(*given_arguments)
        # Rows that see nothing are zero, and NaN or a mean in dense attention.
        sees = expected.isfinite() & (found != 0)
        assert sees.float().mean() > 0.8
        torch.testing.assert_close(found[sees], expected[sees], atol=1e-5, rtol=1e-4)


def test_no_number_of_blocks_may_be_negative_where_lengths_are_symbols() -> None:
    # Inductor puts a condition into every index that it cannot tell from one counted from the end,
    # and its C++ backend cannot read conditions.
    torch._dynamo.reset()
    expressions: list[int | torch.SymInt] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Tensor]:
        (tensor,) = (
            node.meta["example_value"]
            for node in graph.graph.find_nodes(op="placeholder")
            if isinstance(node.meta["example_value"], Tensor)
        )
        geometry = BlockGeometry(q_len=tensor.shape[0], kv_len=tensor.shape[0], block_size=128)
        expressions.extend((geometry.num_q_blocks, geometry.num_kv_blocks))
        return graph.forward

    torch.compile(torch.neg, backend=backend, dynamic=True)(torch.zeros(300))
    assert len(expressions) == 2
    for found in expressions:
        assert isinstance(found, torch.SymInt)
        assert found.node.expr.is_nonnegative


@given(length=st.integers(1, 1000), size=st.sampled_from([1, 16, 128]))
def test_the_last_block_may_be_ragged(length: int, size: int) -> None:
    geometry = BlockGeometry(q_len=length, kv_len=length, block_size=size)
    assert geometry.num_q_blocks == geometry.num_kv_blocks
    assert (geometry.num_kv_blocks - 1) * size < length <= geometry.num_kv_blocks * size


class Cached(nn.Module):
    """Attention to the part of a static cache that is written."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = (tensor[:, :, : query.shape[2]] for tensor in (keys, values))
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True)


def test_static_caches_of_other_sizes() -> None:
    """Strides of such keys hold the size of the cache, which no size says."""
    torch._dynamo.reset()
    selector = UniSparse(block_size=128, top_k=2)
    run = torch.compile(optimize(Cached(), selector, min_length=0))
    plain = optimize(Cached(), selector, min_length=0)
    for size in (512, 384, 448):
        query, keys, values = (torch.randn(1, 2, n, 16) for n in (300, size, size))
        with torch.no_grad():
            torch.testing.assert_close(
                run(query, keys, values), plain(query, keys, values), rtol=1e-4, atol=1e-5
            )
