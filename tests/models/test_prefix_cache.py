"""Chunked prefill and prefix caches: fewer queries than keys, at every offset."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.api.reference import rmse
from unisparse_flex import optimize
from unisparse_flex.integrations.transformers_names import cache_name
from unisparse_flex.passes import DenseReason
from unisparse_flex.reports import record_attention

from .cells import in_float64
from .families import BY_NAME
from .family import EVERYTHING, LENGTH, SELECTOR, token_ids
from .modes import prefill_in_chunks
from .replay import recorded, replayed

BLOCK = SELECTOR.block_size
OFFSETS = (1, BLOCK - 1, BLOCK, 50, 101, LENGTH - BLOCK, LENGTH - 1)
FAMILIES = ("Llama", "Gemma 3")

pytestmark = pytest.mark.usefixtures("one_thread")


def create(family: str, selector: Any = None) -> Any:
    model = BY_NAME[family].create()
    return model if selector is None else optimize(model, selector, min_length=0)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_chunk_is_right_over_its_own_blocks(family: str, offset: int) -> None:
    run = partial(prefill_in_chunks, create(family, SELECTOR), token_ids(), offset)
    output, calls = recorded(run)
    plain = create(family)
    exact = replayed(
        lambda: prefill_in_chunks(in_float64(plain), token_ids(), offset), calls, SELECTOR
    )
    same = replayed(lambda: prefill_in_chunks(plain, token_ids(), offset), calls, SELECTOR)
    assert rmse(output, exact) <= 3 * rmse(same, exact)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_chunk_is_sparse_from_as_many_queries_as_a_block_has(family: str, offset: int) -> None:
    model = create(family, SELECTOR)
    with record_attention(model) as calls:
        prefill_in_chunks(model, token_ids(), offset)
    chunks = [offset] * 2 + [LENGTH - offset] * 2
    expected = [None if queries >= BLOCK else DenseReason.FEW_QUERIES for queries in chunks]
    assert [call.reason for call in calls] == expected


@pytest.mark.parametrize("offsets", [*((offset,) for offset in OFFSETS), (40, 99, 160)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_with_every_block_kept_chunks_are_the_whole(family: str, offsets: tuple[int, ...]) -> None:
    whole = create(family)(input_ids=token_ids()).logits
    chunks = prefill_in_chunks(create(family, EVERYTHING), token_ids(), *offsets)
    assert rmse(chunks, whole) < 2e-6


@torch.no_grad()
def test_one_prefix_cache_serves_several_continuations() -> None:
    prefix = token_ids(length=101)
    plain, model = create("Llama"), create("Llama", EVERYTHING)
    cache = DynamicCache(config=model.config)
    model(input_ids=prefix, **{cache_name(): cache})
    for seed in (1, 2):
        tail = token_ids(length=67, seed=seed)
        output = model(input_ids=tail, **{cache_name(): copy.deepcopy(cache)}).logits
        whole = plain(input_ids=torch.cat((prefix, tail), dim=1)).logits
        assert rmse(output, whole[:, 101:]) < 2e-6
