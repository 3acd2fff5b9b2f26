"""Thousands of calls of changing lengths: memory, caches and compilations stay bounded."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.api.capture import GraphCount
from tests.api.models import FINE, Attention, create, embeddings, qkv
from unisparse_flex import attention, optimize, restore
from unisparse_flex.passes.attend import marker, region
from unisparse_flex.passes.calls import config

CALLS = 2000
# Lengths are drawn anew: allocators keep pages of the largest of them, and Python its own arenas.
MOST_PYTHON_BYTES, MOST_RESIDENT_BYTES = 256 * 1024, 64 * 2**20
CACHES = {
    "settings": config._decode,
    "compiled calls": marker._compiled_sdpa,
    "regions": region._region,
}


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def lengths(count: int, longest: int = 300) -> Iterator[int]:
    draw = random.Random(0)
    return (draw.randint(1, longest) for _ in range(count))


def call(model: nn.Module, length: int) -> None:
    with torch.no_grad():
        model(embeddings(length))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.slow
def test_two_thousand_calls_leave_memory_flat(one_thread: None) -> None:
    model, graphs = optimize(create(Attention), FINE, min_length=0), GraphCount()
    for length in lengths(CALLS // 4):
        call(model, length)
    gc.collect()
    tracemalloc.start()
    try:
        python, resident = tracemalloc.get_traced_memory()[0], resident_bytes()
        for length in lengths(CALLS):
            call(model, length)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - python <= MOST_PYTHON_BYTES
        assert resident_bytes() - resident <= MOST_RESIDENT_BYTES
    finally:
        tracemalloc.stop()
    assert int(graphs) == 0


def test_optimizing_and_restoring_again_and_again_keeps_nothing(one_thread: None) -> None:
    model = create(Attention)
    objects = 0
    for i in range(300):
        call(optimize(model, FINE, min_length=i), 40)
        call(restore(model), 40)
        if i == 100:
            gc.collect()
            objects = len(gc.get_objects())
    gc.collect()
    # The caches of settings fill up meanwhile, to a bound of their own.
    assert len(gc.get_objects()) - objects <= 20 * 200


def test_caches_are_bounded(one_thread: None) -> None:
    query, key, value = qkv(20, heads=(2, 2))
    for scale in range(300):
        attention(query, key, value, scale=float(scale), selector=FINE)
        optimize(create(Attention), FINE, min_length=scale)(embeddings(2))
    for name, cache in CACHES.items():
        info: Any = cache.cache_info()
        assert info.maxsize is not None, name
        assert info.currsize <= info.maxsize, name


@pytest.mark.slow
def test_a_compiled_model_compiles_twice_for_sixty_lengths() -> None:
    torch._dynamo.reset()
    model = optimize(create(Attention), FINE, min_length=100)
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=True)
    graphs = GraphCount()
    for length in (300, 30):
        call(compiled, length)
    resident = resident_bytes()
    for length in lengths(60):
        call(compiled, max(length, 17))
    assert int(graphs) <= 3
    assert resident_bytes() - resident <= MOST_RESIDENT_BYTES
