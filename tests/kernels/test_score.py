"""The scoring kernel alone, against a softmax's numerators in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.block_masks import BlockGeometry
from unisparse_flex.block_masks.kernels.gpu import Gpu

from .calls import pool
from .interpreter import Kernels

SIZE = 16


def tokens(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def row_weights(query: Tensor, key: Tensor, offset: int | None, step: int) -> Tensor:
    """exp(logits) in float64 [B * H, rows, Skv] of the last row of every ``step``, 0 if unseen."""
    q_len, kv_len = query.shape[2], key.shape[2]
    blocks = -(-q_len // SIZE)
    weights = torch.zeros(query.shape[0] * query.shape[1], blocks * SIZE // step, kv_len).double()
    for row in range(weights.shape[1]):
        position = min((row + 1) * step, q_len) - 1
        seen = kv_len if offset is None else min(position + offset + 1, kv_len)
        logits = key[:, :, :seen].double() @ query[:, :, position, :, None].double()
        weights[:, row, :seen] = (logits[..., 0] / 4).exp().flatten(0, 1)
    return weights


def shares(masses: Any) -> Tensor:
    """float64 [heads, rows, blocks] of `Masses`."""
    blocks = masses.blocks.double()
    totals, shifts, spans, firsts = masses.totals.double().unbind(1)
    shifts = torch.where(totals < 0, shifts, 0.0)
    factors = (shifts - shifts.amax(1, keepdim=True)).exp2()
    # Where no part has a shift all factors are 1.
    span = torch.where(totals < 0, spans, blocks.shape[1]).amin(1)
    first = torch.where(totals < 0, firsts, 0.0).amax(1)
    part = (torch.arange(blocks.shape[1])[:, None] - first[:, None]) // span[:, None]
    mass = blocks * factors.gather(1, part.long())
    return (mass / (totals.abs() * factors).sum(1)[:, None]).transpose(1, 2)


def assert_masses(
    kernels: Kernels,
    query: Tensor,
    key: Tensor,
    offset: int | None,
    step: int,
    *,
    heads: slice,
    q_blocks: slice,
    tolerance: float = 1e-5,
) -> None:
    geometry = BlockGeometry(
        q_len=query.shape[2], kv_len=key.shape[2], block_size=SIZE, causal_offset=offset
    )
    _, rows = pool(
        kernels,
        query,
        kv_heads=key.shape[1],
        blocks=geometry.num_q_blocks,
        block_size=SIZE,
        step=step,
    )
    scored = kernels.score.Scored(rows, key, 1, key.shape[2], sampled=True)
    masses = kernels.score.score(
        scored, geometry=geometry, heads=heads, q_blocks=q_blocks, scale=0.25
    )
    per_block = SIZE // step
    weights = row_weights(query, key, offset, step)[
        heads, q_blocks.start * per_block : q_blocks.stop * per_block
    ]
    expected = torch.nn.functional.pad(weights, (0, -key.shape[2] % SIZE))
    expected = expected.unflatten(-1, (-1, SIZE)).sum(-1) / weights.sum(-1, keepdim=True)
    reach = kernels.scratch.reach_of(geometry, q_blocks)
    found = shares(masses)
    assert found.shape == (*expected.shape[:2], reach)
    assert not expected[..., reach:].any()
    # What causality hides from a whole query block is left unset.
    seen = geometry.visible_blocks(key.device)[q_blocks, :reach].repeat_interleave(per_block, 0)
    error = (found - expected[..., :reach]).abs().masked_fill(~seen, 0.0)
    assert error.max() <= tolerance


@settings(max_examples=25)
@given(
    q_len=st.integers(1, 70),
    kv_len=st.integers(1, 90),
    offset=st.none() | st.integers(0, 40),
    step=st.sampled_from([1, 4, 16]),
    head_dim=st.sampled_from([16, 24]),
    data=st.data(),
)
def test_masses_are_the_numerators_of_a_softmax(
    kernels: Kernels,
    q_len: int,
    kv_len: int,
    offset: int | None,
    step: int,
    head_dim: int,
    data: st.DataObject,
) -> None:
    query, key = tokens(2, 2, q_len, head_dim, seed=1), tokens(2, 2, kv_len, head_dim, seed=2)
    blocks = -(-q_len // SIZE)
    start = data.draw(st.integers(0, blocks - 1))
    stop = data.draw(st.integers(start + 1, blocks))
    first = data.draw(st.integers(0, 3))
    heads = slice(first, data.draw(st.integers(first + 1, 4)))
    assert_masses(kernels, query, key, offset, step, heads=heads, q_blocks=slice(start, stop))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2.0**-7), (torch.bfloat16, 2.0**-7)]
)
def test_masses_of_half_precision_err_by_their_rounding(
    kernels: Kernels, dtype: torch.dtype, tolerance: float
) -> None:
    query, key = (tokens(1, 2, 100, 24, seed=s, dtype=dtype) for s in (1, 2))
    assert_masses(
        kernels,
        query,
        key,
        0,
        4,
        heads=slice(0, 2),
        q_blocks=slice(0, 7),
        tolerance=tolerance,
    )


@pytest.mark.parametrize("offset", [None, 300])
def test_totals_in_parts_are_those_of_one(kernels: Kernels, offset: int | None) -> None:
    query, key = tokens(1, 1, 60, 16, seed=1), tokens(1, 1, 600, 16, seed=2)
    for programs in (1, 10**6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels.score, "PROGRAMS_WANTED", programs)
            assert_masses(kernels, query, key, offset, 8, heads=slice(0, 1), q_blocks=slice(0, 4))


@pytest.mark.parametrize("c_k", [2, 4, 8, 16])
@pytest.mark.parametrize("kv_len", [1, 47, 64, 200])
def test_composite_keys_weigh_as_many_keys_as_they_stand_for(
    kernels: Kernels, kv_len: int, c_k: int
) -> None:
    query, key = tokens(1, 1, 20, 16, seed=1), torch.zeros(1, 1, kv_len, 16)
    geometry = BlockGeometry(q_len=20, kv_len=kv_len, block_size=SIZE)
    blocks = geometry.num_kv_blocks
    held = kernels.score.held_blocks(key, SIZE // c_k)
    rows, _ = pool(kernels, query, kv_heads=1, blocks=2, block_size=SIZE, group=4)
    pooled, _ = pool(
        kernels,
        key,
        kv_heads=1,
        blocks=-(-blocks // held) * held,
        block_size=SIZE,
        group=c_k,
        held=held,
    )
    masses = kernels.score.score(
        kernels.score.Scored(rows, pooled.tokens[None], c_k, -(-kv_len // c_k)),
        geometry=geometry,
        heads=slice(0, 1),
        q_blocks=slice(0, 2),
        scale=0.25,
    )
    counts = torch.tensor([min(SIZE, kv_len - j * SIZE) for j in range(blocks)]).double()
    found = shares(masses)
    torch.testing.assert_close(found, (counts / kv_len).expand_as(found), rtol=1e-5, atol=0)


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_a_tile_of_composite_keys_holds_whole_blocks(
    kernels: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
) -> None:
    monkeypatch.setattr(kernels.score, "gpu_of", lambda _: Gpu.of_capability(capability))
    key = torch.empty(1, 1, 1, head_dim, dtype=dtype)
    few, many = (kernels.score.tile_of(key, rows).columns for rows in (1, 10**6))
    assert few == many
    for per_block in (1, 2, 4, 16, 64, 128):
        held = kernels.score.held_blocks(key, per_block)
        assert held == 1 or held * per_block == few


@pytest.mark.parametrize(
    ("strides", "dtype", "taken"),
    [
        ((640, 640, 16, 1), torch.float32, True),
        ((640, 640, 18, 1), torch.float32, False),
        ((640, 640, 20, 1), torch.float32, True),
        ((640, 640, 20, 1), torch.float16, False),
        ((640, 1, 40, 2), torch.float32, False),
    ],
)
def test_keys_are_addressed_in_steps_of_sixteen_bytes(
    kernels: Kernels, strides: tuple[int, ...], dtype: torch.dtype, taken: bool
) -> None:
    keys = torch.empty(4096, dtype=dtype).as_strided((1, 1, 8, 16), strides)
    assert kernels.score.supports_descriptor(keys) == taken
