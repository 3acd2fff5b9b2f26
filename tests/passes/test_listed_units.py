"""Attention of single rows to listed units of keys, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.api.reference import rmse
from unisparse_flex.passes.attend import attend_listed

PLACES, LENGTH, SCALE = 256, 201, 0.25


def listed(unit: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of keys, lists of units, and which keys these are, for two sequences."""
    generator = torch.Generator().manual_seed(unit)
    held = -(-LENGTH // unit)
    kept = torch.rand(2, kv_heads, PLACES // unit, generator=generator) < 0.5
    kept[..., held:] = False
    kept[..., held - 1] = True
    units = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    counts = kept.sum(-1).to(torch.int32) * unit - -LENGTH % unit
    seen = kept.repeat_interleave(unit, -1) & (torch.arange(PLACES) < LENGTH)
    return counts, units, seen


@pytest.mark.parametrize(
    ("unit", "heads", "kv_heads", "masked"), [(16, 6, 2, 0), (32, 7, 1, 1), (128, 4, 4, 2)]
)
def test_it_is_attention_to_these_keys(unit: int, heads: int, kv_heads: int, masked: int) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, heads, 16, generator=generator)
    key, value = (torch.randn(2, kv_heads, PLACES, 16, generator=generator) for _ in range(2))
    # What was never written must not be read.
    key[:, :, LENGTH:] = 1e4
    counts, units, seen = listed(unit, kv_heads)
    mask = None
    if masked:
        mask = torch.rand(masked, PLACES, generator=generator) < 0.8
        mask[:, LENGTH - 1] = True
        seen = seen & mask[:, None]
    lengths = torch.full((2,), LENGTH, dtype=torch.int32)
    found = attend_listed(query, key, value, counts, units, lengths, mask, unit=unit, scale=SCALE)

    def expected(dtype: torch.dtype) -> Tensor:
        rows = query.to(dtype).unflatten(1, (kv_heads, -1))
        logits = (rows @ key.to(dtype).mT * SCALE).masked_fill(~seen[:, :, None], -torch.inf)
        return (logits.softmax(-1) @ value.to(dtype)).flatten(1, 2)

    exact = expected(torch.float64)
    assert rmse(found, exact) <= 2 * rmse(expected(torch.float32), exact)


def test_more_heads_than_the_kernel_has_rows_are_refused() -> None:
    key = torch.zeros(1, 1, 32, 16)
    number = torch.ones(1, 1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"fewer than 128 heads .* got 128"):
        attend_listed(
            torch.zeros(1, 128, 16), key, key, number, number[None], number[0], unit=32, scale=1.0
        )
