"""The communication model counts the bytes that ranks receive."""

from __future__ import annotations

import pytest
import torch

from bench.communication import traffic as context_traffic
from tests.api.models import qkv
from unisparse_flex import Selector, UniSparse
from unisparse_flex.distributed import ContextParallel
from unisparse_flex.distributed.exchange import FACTS_BYTES
from unisparse_flex.passes import SparseConfig
from unisparse_flex.passes.attend.shared_tokens import context_sdpa
from unisparse_flex.passes.calls.sdpa import SdpaCall
from unisparse_flex.passes.decision import cost_model

from .check import kept_blocks
from .ranks import Ranks

LENGTH, SIZE = 256, 16
PAPER = UniSparse.paper(block_size=SIZE, c_q=4, c_k=4, top_k=4, last_query_blocks=0)
SAMPLED = UniSparse(block_size=SIZE, c_q=4, c_k=4, top_k=4, sampled_queries=4, last_query_blocks=0)


def count(selector: Selector, dense: bool) -> tuple[int, float]:
    """Bytes that this rank received, and the share of the others' blocks that it needs."""
    context = ContextParallel(block_size=SIZE)
    query, key, value = (context.shard(t, 2) for t in qkv(LENGTH, batch=2))
    call = SdpaCall(query=query, key=key, value=value, is_causal=True)
    config = SparseConfig(selector=selector, dense=dense, context=context.name)
    if dense:
        context_sdpa(call, config)
        return context.received.total(), 0.0
    kept = torch.cat(kept_blocks(lambda: context_sdpa(call, config)), dim=2)
    needed = kept.any(2).unflatten(1, (2, 2)).any(2)
    others = torch.ones(needed.shape[-1], dtype=torch.bool)
    for span in context.layout(LENGTH).blocks(context.rank):
        others[slice(*span)] = False
    return context.received.total(), float(needed[..., others].double().mean())


@pytest.mark.parametrize("selector", [PAPER, SAMPLED], ids=["composites", "keys"])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_the_formulas_count_every_byte(four: Ranks, selector: UniSparse, dense: bool) -> None:
    traffic = context_traffic.context_traffic(composites=selector.keys_per_composite is not None)
    for received, needed in four.run(count, selector, dense):
        values = {
            context_traffic.R: 4,
            context_traffic.needed: needed,
            cost_model.B: 2,
            cost_model.Hkv: 2,
            cost_model.Skv: LENGTH,
            cost_model.D: 16,
            cost_model.Dv: 16,
            cost_model.itemsize: 4,
            context_traffic.composite_itemsize: 4,
            cost_model.block: SIZE,
            cost_model.c_k: selector.c_k,
        }
        expected = traffic.dense_bytes if dense else traffic.sparse_bytes
        assert received - 3 * FACTS_BYTES == round(float(expected.subs(values)))
        assert dense or 0 < needed < 1


def test_needs_lie_between_the_density_and_everything() -> None:
    values = {cost_model.Hq: 32, cost_model.Hkv: 8, cost_model.block: 128, context_traffic.R: 8}
    needs = context_traffic.independent_needs().subs({**values, cost_model.density: 0.1})
    assert float(needs.subs(cost_model.Sq, 1024)) == pytest.approx(1 - 0.9**4)
    assert float(needs.subs(cost_model.Sq, 2**20)) > 0.999
