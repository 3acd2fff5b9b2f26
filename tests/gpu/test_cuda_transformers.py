"""On CUDA: an eager model under a registered name compiles its attention, masks included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.api.reference import rmse
from tests.integrations.named import create, registered
from tests.models.cells import in_float64
from tests.models.families import BY_NAME
from tests.models.family import token_ids
from tests.models.modes import padded_batch, prefill_in_chunks
from unisparse_flex import UniSparse
from unisparse_flex.passes.attend import marker

EVERYTHING = UniSparse.paper(block_size=32, top_p=1.0)
# Kinds of layers, each compiled once.
FAMILIES = {"Llama": 1, "Mistral": 1, "Gemma 3": 2}

pytestmark = pytest.mark.gpu


def batch_of(side: str) -> dict[str, Tensor]:
    batch = padded_batch(side) if side else {"input_ids": token_ids()}
    return {name: tensor.cuda() for name, tensor in batch.items()}


def assert_computes(output: Tensor, family: str, run: Any) -> None:
    """Asserts that ``output`` errs from float64 no more than the sdpa model does."""
    model = BY_NAME[family].create().cuda()
    exact = run(in_float64(model))
    assert rmse(output, exact) <= 3 * rmse(run(model), exact)


@pytest.mark.parametrize("side", ["", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_block_kept_it_computes_what_sdpa_does(family: str, side: str) -> None:
    torch._dynamo.reset()
    marker._compiled_sdpa.cache_clear()
    batch = batch_of(side)
    real = batch["attention_mask"].bool() if side else slice(None)

    @torch.no_grad()
    def run(model: Any) -> Tensor:
        return model(**batch).logits[real]

    with registered(EVERYTHING) as name:
        counters.clear()
        output = run(create(family, name).cuda())
        assert counters["stats"]["unique_graphs"] == FAMILIES[family]
    assert_computes(output, family, run)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_of_a_prompt_compute_what_sdpa_does(family: str) -> None:
    """Masks whose offsets are numbers of the formula, dynamic after the first."""
    torch._dynamo.reset()
    ids = token_ids().cuda()

    @torch.no_grad()
    def run(model: Any) -> Tensor:
        return prefill_in_chunks(model, ids, 64, 101, 150)

    with registered(EVERYTHING) as name:
        output = run(create(family, name).cuda())
    assert_computes(output, family, run)
