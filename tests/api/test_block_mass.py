"""The exact mass of blocks, against softmax by its definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unisparse_flex import UniSparse
from unisparse_flex.calibrating import block_mass
from unisparse_flex.calibrating.block_mass import compute_block_mass
from unisparse_flex.passes import SparseConfig
from unisparse_flex.passes.attend.sparse_attention import call_geometry
from unisparse_flex.passes.calls.sdpa import SdpaCall

from .models import qkv

SIZE = 16


def by_definition(call: SdpaCall, seen: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Weights of every pair, in float64, summed by block: [B, Hq, Nq, Nk]."""
    query = call.query.double()
    key = call.key.double().repeat_interleave(query.shape[1] // call.key.shape[1], dim=1)
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    rows, keys = (-(-length // SIZE) for length in weights.shape[2:])
    padded = weights.new_zeros(*weights.shape[:2], rows * SIZE, keys * SIZE)
    padded[..., : weights.shape[2], : weights.shape[3]] = weights
    return padded.unflatten(3, (keys, SIZE)).unflatten(2, (rows, SIZE)).sum((3, 5))


def mass(call: SdpaCall) -> Tensor:
    selector = UniSparse(block_size=SIZE)
    return compute_block_mass(call, call_geometry(call, SparseConfig(selector=selector)))


@pytest.mark.parametrize("length", [1, 16, 63, 129])
@pytest.mark.parametrize("rows_per_step", [1, 2**22])
def test_causal_mass_is_that_of_softmax(
    length: int, rows_per_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_mass, "WEIGHTS_PER_STEP", rows_per_step)
    query, key, value = qkv(length, batch=2)
    call = SdpaCall(query=query, key=key, value=value, is_causal=True)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    found = mass(call)
    torch.testing.assert_close(found.double(), by_definition(call, seen), rtol=1e-5, atol=1e-5)
    assert float(found.sum()) == pytest.approx(2 * 4 * length, rel=1e-5)


def test_the_last_rows_of_a_longer_cache_see_all_before_them() -> None:
    query, key, value = qkv(40, 100)
    call = SdpaCall(query=query, key=key, value=value, causal_lower_right=True)
    seen = torch.ones(40, 100, dtype=torch.bool).tril(60)
    torch.testing.assert_close(mass(call).double(), by_definition(call, seen), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(70, 70), (2, 1, 1, 70), (1, 4, 70, 70)])
@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_hides_or_adds(shape: tuple[int, ...], additive: bool) -> None:
    query, key, value = qkv(70, batch=2)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(shape, generator=generator)
    own: Any = drawn.masked_fill(drawn < -1, -torch.inf) if additive else drawn > -0.5
    call = SdpaCall(query=query, key=key, value=value, attn_mask=own)
    seen = own > -torch.inf if additive else own
    expected = by_definition(call, seen, own.double() if additive else 0.0)
    torch.testing.assert_close(mass(call).double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_that_see_nothing_hold_nothing() -> None:
    query, key, value = qkv(64)
    seen = torch.ones(64, 64, dtype=torch.bool)
    seen[20:40] = False
    found = mass(SdpaCall(query=query, key=key, value=value, attn_mask=seen))
    assert found.sum(-1)[0, 0].tolist() == pytest.approx([16.0, 4.0, 8.0, 16.0])
