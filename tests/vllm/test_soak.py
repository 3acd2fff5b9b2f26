"""Many requests of random lengths, cancelled at random: no stale mean, no memory that grows.

``python -m pytest ... --soak 500`` runs more of them.
"""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from unisparse_flex.block_masks.pages import PagedKeys, select_from_pages
from unisparse_flex.integrations.vllm import read_counts, sparse_rows

from .engine import prompt_of, serving

SETTINGS = {"selector": "UniSparse(block_size=64, top_k=3)", "min_length": 0}


def assert_means_are_fresh(keys: PagedKeys) -> None:
    """Compares the means of a request's finished pages with those of the keys that lie there."""
    finished = keys.table[: keys.length // keys.page].long()
    group = keys.page // keys.means.shape[2]
    fresh = keys.pages[finished].unflatten(2, (-1, group)).mean(3)
    torch.testing.assert_close(keys.means[finished], fresh, rtol=1e-5, atol=1e-5)


def count_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.slow
def test_means_stay_fresh_and_memory_flat(
    llama: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from vllm import SamplingParams

    checked = 0

    def check(selector: Any, query: Any, keys: PagedKeys, **options: Any) -> Any:
        nonlocal checked
        assert_means_are_fresh(keys)
        checked += keys.length // keys.page
        return select_from_pages(selector, query, keys, **options)

    monkeypatch.setattr(sparse_rows, "select_from_pages", check)
    generator = random.Random(0)
    total = request.config.getoption("--soak")
    shared = prompt_of(600, 0)
    options: dict[str, Any] = {
        "max_num_batched_tokens": 512,
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": 60,
        "block_size": 64,
        "disable_log_stats": False,
    }
    with serving(llama, SETTINGS, **options) as llm:
        engine = llm.llm_engine
        alive: set[str] = set()
        added = cancelled = 0
        tensors = []
        while added < total or alive:
            if added < total and len(alive) < 6:
                length = generator.randrange(1, 1000)
                prompt = shared[: generator.choice((0, 300, 600))] + prompt_of(length, added)
                tokens = generator.randrange(1, 90)
                engine.add_request(
                    str(added),
                    {"prompt_token_ids": prompt},
                    SamplingParams(max_tokens=tokens, detokenize=False, ignore_eos=True),
                )
                alive.add(str(added))
                added += 1
                if added in (total // 3, total):
                    tensors.append(count_tensors())
            if alive and generator.random() < 0.02:
                victim = generator.choice(sorted(alive))
                engine.abort_request([victim])
                alive.discard(victim)
                cancelled += 1
            alive -= {output.request_id for output in engine.step() if output.finished}
        metrics = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    assert cancelled > 0
    assert checked > 10 * total
    assert read_counts().sparse_rows > total / 3
    assert metrics["vllm:num_preemptions"] > 0
    assert metrics["vllm:prefix_cache_hits"] > 0
    # Requests in flight hold a few each. The process itself grows with vLLM alone too.
    assert tensors[1] - tensors[0] < 100
