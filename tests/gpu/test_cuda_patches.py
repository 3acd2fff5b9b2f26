"""On CUDA: patches of images and video attend by tiles, beside text that stays dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.api.models import qkv
from tests.api.reference import rmse
from tests.api.test_patch_attention import sdpa_over_kept
from unisparse_flex import UniSparse, patch_attention
from unisparse_flex.selectors import PatchOrder

pytestmark = pytest.mark.gpu

FORCED: dict[str, Any] = {"sink_blocks": 0, "last_query_blocks": 0}
ALL = UniSparse.paper(top_p=1.0, **FORCED)
FEW = UniSparse.paper(top_k=3, **FORCED)
TWO = UniSparse.paper(c_q=16, c_k=128, sampled_queries=4, top_k=3, **FORCED)
# Whole tiles, cut ones, and text on one side.
ORDERS = [
    PatchOrder(grid=(4, 16, 32), tile=(2, 8, 8)),
    PatchOrder(grid=(3, 13, 30), tile=(2, 8, 8), cell=(2, 2, 2)),
    PatchOrder(grid=(4, 16, 32), tile=(2, 8, 8), text_after=100),
]


def tensors(order: PatchOrder) -> tuple[Tensor, Tensor, Tensor]:
    shape: dict[str, Any] = {"batch": 1, "heads": (4, 2), "head_dim": 64, "dtype": torch.bfloat16}
    query, key, value = qkv(q_len=order.num_tokens, **shape)
    return query.cuda(), key.cuda(), value.cuda()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_with_every_block_kept_it_is_sdpa_in_raster_order(
    order: PatchOrder, compiled: bool
) -> None:
    torch._dynamo.reset()
    query, key, value = tensors(order)

    def run(*inputs: Tensor) -> Tensor:
        return patch_attention(*inputs, order=order, selector=ALL, enable_gqa=True)

    with torch.no_grad():
        output = (torch.compile(run) if compiled else run)(query, key, value)
        plain = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        exact = F.scaled_dot_product_attention(
            query.double(), key.double(), value.double(), enable_gqa=True
        )
    assert rmse(output, exact) <= 2 * rmse(plain, exact)


@pytest.mark.parametrize("selector", [FEW, TWO], ids=["composites", "two"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_below_that_it_is_sdpa_over_the_kept_tiles(order: PatchOrder, selector: UniSparse) -> None:
    query, key, value = tensors(order)
    with torch.no_grad():
        output = patch_attention(query, key, value, order=order, selector=selector, enable_gqa=True)
        exact, mask = sdpa_over_kept(query, key, value, order, selector)
        plain = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    assert not mask.all()
    assert rmse(output, exact) <= 2 * rmse(plain, exact)
