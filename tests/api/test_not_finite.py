"""NaN and infinity in queries and keys reach the rows that they reach in dense attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unisparse_flex import UniSparse, optimize

FEW = UniSparse(block_size=32, top_k=3)
LENGTH = 256


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = None
        if self.kind in ("bool", "float"):
            mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(-100)
            mask[40] = False
        if mask is not None and self.kind == "float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        causal = self.kind == "causal"
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=True
        )

    def visible(self) -> Tensor:
        """bool [LENGTH, LENGTH]."""
        whole = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
        if self.kind == "none":
            return whole
        seen = whole.tril()
        if self.kind in ("bool", "float"):
            seen = seen.triu(-100)
            seen[40] = False
        return seen


def lost_rows(tensors: list[Tensor], visible: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [1, 4, LENGTH] whose output is not finite, by definition, and those that may be 0.

    These are rows that see no logit but -inf: dense kernels take all their keys for hidden.
    """
    query, key, value = (t.double() for t in tensors)
    logits = query @ key.repeat_interleave(2, dim=1).mT / 4
    logits = logits.masked_fill(~visible, -torch.inf)
    weights = logits.softmax(-1)
    weights = weights.masked_fill(~visible.any(-1)[:, None], 0.0)
    out = weights @ value.repeat_interleave(2, dim=1)
    return ~out.isfinite().all(-1), logits.eq(-torch.inf).all(-1)


@cache
def runner(kind: str, how: str) -> Callable[..., Tensor]:
    model = optimize(Attention(kind), FEW, min_length=0)
    run: Any = torch.compile(model) if how == "compiled" else model
    return run


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled() -> Iterator[None]:
    yield
    runner.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kind", "how"),
    [*((kind, "eager") for kind in ("causal", "none", "bool", "float")), ("causal", "compiled")],
)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_is_not_finite_reaches_the_rows_that_see_it(
    kind: str, how: str, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    tensors = [torch.randn((1, h, LENGTH, 16), generator=generator) for h in (4, 2, 2)]
    for _ in range(data.draw(st.integers(1, 3), "values")):
        which = data.draw(st.sampled_from([0, 1]), "tensor")
        head = data.draw(st.integers(0, tensors[which].shape[1] - 1), "head")
        token = data.draw(st.integers(0, LENGTH - 1), "token")
        value = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]), "value")
        tensors[which][0, head, token, data.draw(st.integers(0, 15), "dim")] = value
    with torch.no_grad():
        found = runner(kind, how)(*tensors)
    want, may_be_0 = lost_rows(tensors, Attention(kind).visible())
    lost = ~found.isfinite().all(-1)
    assert lost.equal(torch.where(may_be_0, lost, want))
    assert not found[may_be_0 & ~lost].any()
