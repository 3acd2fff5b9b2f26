"""The same inputs give the same selection, bit for bit, in every run, compiled or not."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.api.models import qkv
from unisparse_flex import Selector, UniSparse
from unisparse_flex.selectors import (
    DEFAULT_SELECTOR,
    FlashPrefill,
    FlexPrefill,
    MInference,
    Oracle,
    StreamingLLM,
    XAttention,
)

ROOT = Path(__file__).parents[2]
SELECTORS: tuple[Selector, ...] = (
    UniSparse(block_size=16, c_q=4, c_k=4, top_p=0.5),
    UniSparse(block_size=16, c_q=16, c_k=4, threshold=0.05, top_p=0.3, sampled_queries=4),
    UniSparse(block_size=16, top_k=2),
    DEFAULT_SELECTOR,
    XAttention(block_size=16, stride=4, top_p=0.5),
    FlashPrefill(block_size=16, alpha=0.6),
    FlexPrefill(block_size=16, top_p=0.5, min_budget=16),
    MInference(block_size=16, vertical_slash=(9, 9), last_q=8, sink_tokens=1),
    Oracle(block_size=16, top_p=0.5),
    StreamingLLM(block_size=16, sink_tokens=4, local_tokens=18),
)
LENGTHS = (33, 300)


def name(selector: Selector) -> str:
    return type(selector).__name__


every_selector = pytest.mark.parametrize("selector", SELECTORS, ids=name)


def keep(selector: Selector, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    query, key, _ = qkv(length, batch=2, dtype=dtype)
    return selector.select(query, key, is_causal=True).keep


def digest() -> str:
    """Of every selection here."""
    text = hashlib.sha256()
    for selector in SELECTORS:
        for length in LENGTHS:
            for dtype in (torch.float32, torch.bfloat16):
                text.update(bytes(keep(selector, length, dtype).flatten().tolist()))
    return text.hexdigest()


@every_selector
def test_a_call_selects_what_the_call_before_it_did(selector: Selector) -> None:
    for length in LENGTHS:
        first = keep(selector, length)
        assert all(keep(selector, length).equal(first) for _ in range(3))


@every_selector
def test_the_number_of_threads_changes_nothing(selector: Selector) -> None:
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(keep(selector, 300))
    finally:
        torch.set_num_threads(threads)
    assert all(one.equal(found[0]) for one in found)


@pytest.mark.parametrize("selector", SELECTORS[4:], ids=name)
def test_a_traced_selection_is_the_eager_one(selector: Selector) -> None:
    torch._dynamo.reset()
    query, key, _ = qkv(300, batch=2)
    select = torch.compile(
        lambda q, k: selector.select(q, k, is_causal=True).keep,
        backend="aot_eager",
        fullgraph=True,
    )
    assert select(query, key).equal(keep(selector, 300))


@pytest.mark.slow
@pytest.mark.parametrize("selector", [SELECTORS[0], DEFAULT_SELECTOR], ids=name)
def test_a_selection_compiled_by_inductor_is_the_eager_one(selector: Selector) -> None:
    torch._dynamo.reset()
    select = torch.compile(
        lambda q, k: selector.select(q, k, is_causal=True).keep, fullgraph=True, dynamic=True
    )
    query, key, _ = qkv(300, batch=2)
    assert select(query, key).equal(keep(selector, 300))


def test_another_run_selects_the_same() -> None:
    program = "from tests.robustness.test_determinism import digest; print(digest())"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == digest()
