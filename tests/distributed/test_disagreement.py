"""Ranks that differ or die: one clear error on all ranks, in time."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.api.models import FINE, create, embeddings, qkv
from unisparse_flex import UniSparse, optimize
from unisparse_flex.distributed import (
    ContextParallel,
    context_parallel_attention,
    validate_same_settings,
)
from unisparse_flex.selectors import FlexPrefill

from .ranks import Failure, Ranks

LENGTH = 203
OTHER = UniSparse(block_size=16, c_q=4, c_k=4, top_k=4)


def call(**changed: Any) -> None:
    """One call in which rank 1 differs."""
    differs = dist.get_rank() == 1
    given: dict[str, Any] = {"block_size": 16, "selector": FINE, "is_causal": True, "scale": 1.0}
    given |= {"length": LENGTH, "heads": (4, 2), "batch": 1, "dtype": torch.float32}
    given |= changed if differs else {}
    length, heads, batch, dtype, block_size = (
        given.pop(name) for name in ("length", "heads", "batch", "dtype", "block_size")
    )
    context = ContextParallel(block_size=block_size)
    tensors = (context.shard(t.to(dtype), 2) for t in qkv(length, heads=heads, batch=batch))
    query, key, value = tensors
    context_parallel_attention(query, key, value, context=context, **given)


DIFFERENT: list[tuple[dict[str, Any], str]] = [
    ({"selector": OTHER}, "selector must be the same on every rank .* rank 1: .*top_k=4"),
    ({"is_causal": False}, "is_causal must be the same on every rank"),
    (
        {"is_causal": False, "causal_lower_right": True},
        "(is_causal|causal_lower_right) must be the same on every rank",
    ),
    ({"scale": 2.0}, "scale must be the same on every rank .*rank 0: 1.0, rank 1: 2.0"),
    ({"heads": (2, 2)}, "query must be the same on every rank"),
    ({"batch": 2}, "query must be the same on every rank"),
    ({"dtype": torch.float64}, "dtype must be the same on every rank"),
    ({"block_size": 32}, "layout must be the same on every rank"),
    ({"length": 150}, "query must hold .* tokens on the ranks of the context"),
    (
        {"block_size": 32, "selector": UniSparse(block_size=64)},
        "block_size of the context must be a multiple of the selector's 64, got 32",
    ),
]


@pytest.mark.parametrize(("changed", "message"), DIFFERENT)
def test_ranks_that_differ_all_raise(two: Ranks, changed: dict[str, Any], message: str) -> None:
    failures = two.attempt(call_with, changed)
    for failure in failures:
        assert isinstance(failure, Failure)
        assert failure.kind == "ValueError"
        with pytest.raises(ValueError, match=message):
            raise ValueError(failure.message)


def call_with(changed: dict[str, Any]) -> None:
    call(**changed)


def test_ranks_work_on_after_they_differed(two: Ranks) -> None:
    two.attempt(call_with, {"scale": 2.0})
    assert two.run(call_with, {}) == [None, None]


def call_refused(options: dict[str, Any]) -> None:
    context = ContextParallel(block_size=16)
    query, key, value = (context.shard(t, 2) for t in qkv(LENGTH))
    if options.pop("grad", False):
        query.requires_grad_()
    arguments = {"context": context, "selector": FINE, **options}
    context_parallel_attention(query, key, value, **arguments)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"grad": True}, "NotImplementedError", "no gradient"),
        ({"selector": FlexPrefill(block_size=16)}, "NotImplementedError", "query rows that other"),
        ({"context": "all"}, "TypeError", "context must be a ContextParallel"),
        ({"pieces": (96, 96)}, "ValueError", "key must hold"),
        ({"is_causal": 1}, "TypeError", "is_causal must be True or False, got 1 of type int"),
        (
            {"is_causal": True, "causal_lower_right": True},
            "ValueError",
            "is_causal and causal_lower_right must not both be given, got both; keep",
        ),
        ({"pieces": (100, 103)}, "ValueError", r"pieces\[0\] must be a multiple of block_size 16"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    two: Ranks, options: dict[str, Any], kind: str, message: str
) -> None:
    for failure in two.attempt(call_refused, options):
        assert failure.kind == kind
        with pytest.raises(ValueError, match=message):
            raise ValueError(failure.message)


def run_with_mask(first_alone: bool) -> None:
    context = ContextParallel(block_size=16)
    model: Any = optimize(create(layers=1), FINE, min_length=0, context=context)
    x = context.shard(embeddings(LENGTH), 1)
    with torch.no_grad():
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        model.layers[0].attention(x, None if first_alone and context.rank else mask)


def test_a_mask_over_shards_is_refused(two: Ranks) -> None:
    for failure in two.attempt(run_with_mask, False):
        assert "attn_mask" in failure.message


def test_a_mask_on_one_rank_is_refused_by_all(two: Ranks) -> None:
    first, second = two.attempt(run_with_mask, True)
    assert first.kind == "NotImplementedError"
    assert second.kind == "ValueError"
    assert f"rank 0 of the context refuses the call: {first.message}" == second.message


def call_without(rank: int, dies: bool) -> tuple[float, str] | None:
    """A rank misses the second call: seconds until the others know, and what they hear."""
    context = ContextParallel(block_size=16)
    query, key, value = (context.shard(t, 2) for t in qkv(LENGTH))
    context_parallel_attention(query, key, value, context=context, selector=FINE)
    if dist.get_rank() == rank:
        if dies:
            os._exit(3)
        return None
    start = time.monotonic()
    try:
        context_parallel_attention(query, key, value, context=context, selector=FINE)
    except RuntimeError as error:
        return time.monotonic() - start, str(error)
    raise AssertionError("the call came back")


def test_a_rank_that_dies_ends_the_others_call() -> None:
    patience = 20.0
    ranks = Ranks(3, patience)
    try:
        results = ranks.attempt(call_without, 1, True)
    finally:
        ranks.close()
    assert isinstance(results[1], Failure)
    assert results[1].kind == "EOFError"
    for seconds, message in (results[0], results[2]):
        assert "lost the others while it compared settings: a rank died" in message
        assert seconds < patience + 5


def test_a_rank_that_does_not_come_is_waited_for_as_long_as_stated() -> None:
    patience = 3.0
    ranks = Ranks(2, patience)
    try:
        (seconds, message), nothing = ranks.run(call_without, 1, False, seconds=60)
    finally:
        ranks.close()
    assert nothing is None
    assert "did not come within the group's timeout" in message
    assert patience - 0.5 < seconds < patience + 10


def validate(change: bool) -> None:
    model = optimize(create(), OTHER if change and dist.get_rank() == 1 else FINE)
    validate_same_settings(model)


def test_models_that_were_optimized_differently_are_found(two: Ranks) -> None:
    assert two.run(validate, False) == [None, None]
    for failure in two.attempt(validate, True):
        assert failure.kind == "ValueError"
        assert "with the same settings on every rank, got 2 different ones" in failure.message
        assert "top_k=3" in failure.message
        assert "top_k=4" in failure.message


def call_with_thresholds(last: float) -> None:
    """A selector whose text is longer than the message of facts."""
    given = last if dist.get_rank() == 1 else 0.5
    thresholds = (*(0.0123456789,) * 127, given)
    selector = UniSparse(block_size=16, c_q=4, c_k=4, head_thresholds=thresholds)
    context = ContextParallel(block_size=16)
    query, key, value = (context.shard(t, 2) for t in qkv(LENGTH, heads=(128, 2)))
    context_parallel_attention(query, key, value, context=context, selector=selector)


def test_long_settings_are_compared_whole(two: Ranks) -> None:
    assert two.run(call_with_thresholds, 0.5) == [None, None]
    for failure in two.attempt(call_with_thresholds, 0.6):
        assert "selector must be the same on every rank" in failure.message
