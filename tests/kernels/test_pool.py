"""The pooling kernel alone, against plain means of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .calls import pool
from .interpreter import Kernels

SIZE = 16


def random_tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def merged_heads(tokens: Tensor, merged: int) -> Tensor:
    """float64 [B, H, S, D]: the mean of every ``merged`` consecutive heads."""
    return tokens.double().unflatten(1, (-1, merged)).mean(2)


def expected_means(tokens: Tensor, blocks: int, group: int) -> Tensor:
    """[B, H, blocks, groups of a block, D], zero behind the last token."""
    batch, heads, _, head_dim = tokens.shape
    means = torch.zeros(batch, heads, blocks * SIZE // group, head_dim, dtype=torch.float64)
    for i, chunk in enumerate(tokens.split(group, dim=2)):
        means[:, :, i] = chunk.mean(2)
    return means.unflatten(2, (blocks, SIZE // group))


def by_key_head(rows: Tensor, kv_heads: int) -> Tensor:
    """[B, H, blocks, R, D] in the order of the scratch: [B * Hkv, blocks * heads * R, D]."""
    grouped = rows.unflatten(1, (kv_heads, -1)).transpose(2, 3)
    return grouped.flatten(2, 4).flatten(0, 1)


@settings(max_examples=15)
@given(
    length=st.integers(1, 70),
    heads=st.sampled_from([(2, 1, 1), (2, 1, 2), (4, 2, 2), (6, 2, 3), (3, 1, 1)]),
    group=st.sampled_from([1, 2, 4, 16]),
    head_dim=st.sampled_from([16, 24]),
)
def test_means_are_those_of_the_tokens_that_exist(
    kernels: Kernels, length: int, heads: tuple[int, int, int], group: int, head_dim: int
) -> None:
    q_heads, kv_heads, merged = heads
    tokens = random_tokens(2, q_heads, length, head_dim)
    blocks = -(-length // SIZE)
    means, lasts = pool(
        kernels,
        tokens,
        kv_heads=kv_heads,
        blocks=blocks,
        block_size=SIZE,
        merged=merged,
        group=group,
    )
    expected = expected_means(merged_heads(tokens, merged), blocks, group)
    assert lasts is None
    assert means.size == group
    torch.testing.assert_close(
        means.tokens.double(), by_key_head(expected, kv_heads), rtol=0, atol=1e-6
    )


@settings(max_examples=15)
@given(
    length=st.integers(1, 70),
    heads=st.sampled_from([(2, 1, 1), (4, 2, 2), (6, 2, 3)]),
    step=st.sampled_from([1, 4, 8, 16]),
)
def test_the_last_token_of_every_step_is_picked(
    kernels: Kernels, length: int, heads: tuple[int, int, int], step: int
) -> None:
    q_heads, kv_heads, merged = heads
    tokens = random_tokens(2, q_heads, length, 16)
    blocks = -(-length // SIZE)
    means, lasts = pool(
        kernels, tokens, kv_heads=kv_heads, blocks=blocks, block_size=SIZE, merged=merged, step=step
    )
    # Behind the last token there is none to pick: the last is repeated.
    picked = [min(end, length) - 1 for end in range(step, blocks * SIZE + 1, step)]
    rows = merged_heads(tokens, merged)[:, :, picked].unflatten(2, (blocks, SIZE // step))
    assert means is None
    assert lasts.size == step
    torch.testing.assert_close(
        lasts.tokens.double(), by_key_head(rows, kv_heads), rtol=0, atol=1e-6
    )


def test_both_come_from_one_pass(kernels: Kernels) -> None:
    options = {"kv_heads": 1, "blocks": 3, "block_size": SIZE, "merged": 2}
    tokens = random_tokens(1, 4, 41, 24)
    means, lasts = pool(kernels, tokens, group=4, step=8, **options)
    assert means.tokens.equal(pool(kernels, tokens, group=4, **options)[0].tokens)
    assert lasts.tokens.equal(pool(kernels, tokens, step=8, **options)[1].tokens)


@pytest.mark.parametrize("held", [2, 4])
def test_the_means_of_held_blocks_are_interleaved(kernels: Kernels, held: int) -> None:
    tokens = random_tokens(2, 2, 50, 16)
    blocks = -(-4 // held) * held
    means, _ = pool(kernels, tokens, kv_heads=2, blocks=blocks, block_size=SIZE, group=4, held=held)
    plain = expected_means(tokens.double(), blocks, 4)
    interleaved = plain.unflatten(2, (-1, held)).transpose(3, 4).flatten(2, 4).flatten(0, 1)
    torch.testing.assert_close(means.tokens.double(), interleaved, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)]
)
def test_half_precision_is_averaged_in_float32(
    kernels: Kernels, dtype: torch.dtype, tolerance: float
) -> None:
    tokens = random_tokens(1, 2, 48, 16, dtype=dtype) + 64
    means, _ = pool(kernels, tokens, kv_heads=2, blocks=3, block_size=SIZE, group=16)
    expected = by_key_head(expected_means(tokens.double(), 3, 16), 2)
    assert means.tokens.dtype is dtype
    torch.testing.assert_close(means.tokens.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_a_mean_that_is_not_finite_is_not_a_number(kernels: Kernels, value: float) -> None:
    tokens = random_tokens(1, 1, 32, 16)
    tokens[0, 0, 20:22, 5] = value
    means, _ = pool(kernels, tokens, kv_heads=1, blocks=2, block_size=SIZE, group=4)
    spoilt = torch.zeros(8, 16, dtype=torch.bool)
    spoilt[5, 5] = True
    assert means.tokens[0].isnan().equal(spoilt)


def test_strided_tokens_are_read_where_they_lie(kernels: Kernels) -> None:
    tokens = random_tokens(2, 40, 4, 24).transpose(1, 2)
    options = {"kv_heads": 2, "blocks": 3, "block_size": SIZE, "group": 4, "step": 4}
    found = pool(kernels, tokens, **options)
    for one, other in zip(found, pool(kernels, tokens.contiguous(), **options), strict=True):
        assert one.tokens.equal(other.tokens)


@pytest.mark.parametrize("masked", [False, True])
def test_queries_and_keys_are_pooled_in_one_launch_as_alone(kernels: Kernels, masked: bool) -> None:
    query, key = random_tokens(2, 4, 41, 24), random_tokens(2, 2, 70, 24)
    valid: dict[str, Any] = {"query": None, "key": None}
    if masked:
        valid = {n: (t[:, 0, :, 0] > -1).byte() for n, t in (("query", query), ("key", key))}
    queries: dict[str, Any] = {
        "blocks": 3,
        "merged": 2,
        "group": 4,
        "step": 8,
        "valid": valid["query"],
    }
    keys: dict[str, Any] = {"blocks": 6, "group": 8, "held": 2, "valid": valid["key"]}
    options: dict[str, Any] = {"kv_heads": 2, "block_size": SIZE}
    make = kernels.pool.Side
    means, lasts, key_means = kernels.pool.pool(
        make(tokens=query, **queries), keys=make(tokens=key, **keys), **options
    )
    alone = pool(kernels, query, **queries, **options)
    assert means.tokens.equal(alone[0].tokens)
    assert lasts.tokens.equal(alone[1].tokens)
    assert key_means.tokens.equal(pool(kernels, key, **keys, **options)[0].tokens)
