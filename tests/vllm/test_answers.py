"""With every block kept an engine answers as its parent, whatever the batch looks like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unisparse_flex import UniSparse, optimize
from unisparse_flex.integrations.vllm import Reason, kernels, read_counts
from unisparse_flex.integrations.vllm.cache_view import CacheView, view_transposed

from .engine import ALL_BLOCKS, MAX_LENGTH, Answer, ask, differ_by, prompt_of, serving

# Both sides of blocks and pages, and rows that are too short to run sparse.
PROMPTS = [prompt_of(length, length) for length in (1000, 640, 50, 257, 384, 1)]
SMALL = {"selector": "UniSparse(block_size=64, top_p=1.0)", "min_length": 0}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[Answer]:
    with serving(llama, None) as engine:
        return ask(engine, PROMPTS)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (ALL_BLOCKS, {}),
        (ALL_BLOCKS, {"max_num_batched_tokens": 640}),
        (SMALL, {"max_num_batched_tokens": 64, "block_size": 64}),
        (SMALL, {"max_num_batched_tokens": 640, "block_size": 32}),
        (ALL_BLOCKS, {"block_size": 64}),
        (ALL_BLOCKS, {"enforce_eager": False, "max_num_batched_tokens": 640}),
    ],
    ids=["whole", "chunks-640", "chunks-64", "pages-32", "pages-64", "compiled"],
)
def test_all_blocks_answer_as_the_parent(
    llama: Path, expected: list[Answer], settings: dict[str, Any], options: dict[str, Any]
) -> None:
    with serving(llama, settings, **options) as engine:
        found = ask(engine, PROMPTS)
    assert differ_by(found, expected) < TOLERANCE
    counts = read_counts()
    assert counts.sparse_calls > 0
    assert counts.kept_blocks == counts.visible_blocks > 0
    assert counts.dense_rows.keys() <= {Reason.DECODE}
    assert not counts.dense_calls


def test_a_wrong_layout_does_not_answer_as_the_parent(
    llama: Path, expected: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def misread(cache: Tensor) -> CacheView | Reason:
        right = view_transposed(cache)
        assert isinstance(right, CacheView)
        # The pages of another head.
        return CacheView(
            pages=right.pages,
            key=right.key.roll(1, 0),
            value=right.value,
            steps=right.steps,
            unit=right.unit,
        )

    monkeypatch.setattr(
        kernels.CpuKernel, "view", lambda self, layer, cache, unit=None: misread(cache)
    )
    with serving(llama, ALL_BLOCKS) as engine:
        assert differ_by(ask(engine, PROMPTS), expected) > 100 * TOLERANCE


def test_a_prompt_whose_beginning_is_cached_answers_as_the_parent(llama: Path) -> None:
    shared = prompt_of(700, 1)
    prompts = [shared + prompt_of(300, seed) for seed in (2, 3)]
    with serving(llama, None) as engine:
        expected = ask(engine, prompts)
        # An answer is part of the next prompt: pages that decoding filled are read too.
        prompts.append(prompts[1] + expected[1].tokens + prompt_of(200, 4))
        expected += ask(engine, prompts[2:])
    with serving(llama, ALL_BLOCKS, enable_prefix_caching=True) as engine:
        found = [ask(engine, [prompt])[0] for prompt in prompts]
    assert differ_by(found, expected) < TOLERANCE
    # 640 of the second prompt's tokens, and more of the third's, were not computed again.
    assert read_counts().sparse_tokens < 1000 + 400 + 400


def test_preempted_requests_answer_as_the_parent(llama: Path) -> None:
    prompts = [prompt_of(length, length) for length in (500, 510, 490, 505)]
    with serving(llama, None) as engine:
        expected = ask(engine, prompts, tokens=150)
    # Room for the prompts of four, not for their answers too.
    few = {"num_gpu_blocks_override": 18, "block_size": 128, "max_model_len": 1024}
    with serving(llama, ALL_BLOCKS, disable_log_stats=False, **few) as engine:
        found = ask(engine, prompts, tokens=150)
        metrics = {m.name: getattr(m, "value", 0) for m in engine.get_metrics()}
    assert metrics["vllm:num_preemptions"] > 0
    assert differ_by(found, expected) < TOLERANCE


SPARSE = UniSparse(top_k=3)
SPARSE_SETTINGS = {"selector": SPARSE.text, "min_length": 0}


def continue_with_transformers(
    model: Path, prompts: Sequence[Sequence[int]]
) -> list[dict[int, float]]:
    """Log-probabilities of the next token, with the library's attention in transformers."""
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(model, attn_implementation="sdpa").eval()
    optimize(llama, SPARSE, min_length=0)
    found = []
    for prompt in prompts:
        with torch.no_grad():
            logits = llama(torch.tensor([list(prompt)])).logits[0, -1]
        found.append(dict(enumerate(logits.log_softmax(-1).tolist())))
    return found


@pytest.mark.parametrize("budget", [MAX_LENGTH, 640])
def test_sparse_answers_are_those_of_the_library(llama: Path, budget: int) -> None:
    prompts = [prompt_of(length, length) for length in (1500, 900)]
    expected = continue_with_transformers(llama, prompts)
    with serving(llama, SPARSE_SETTINGS, max_num_batched_tokens=budget, max_num_seqs=1) as engine:
        found = ask(engine, prompts, tokens=1)
    for answer, reference in zip(found, expected, strict=True):
        for token, logprob in answer.logprobs[0].items():
            assert logprob == pytest.approx(reference[token], abs=TOLERANCE)
    counts = read_counts()
    assert 0 < counts.density < 0.9
