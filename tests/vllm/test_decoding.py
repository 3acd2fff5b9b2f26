"""Sparse decoding in an engine: with every page it answers as its parent, with fewer it reads them.

The engine runs on the CPU, where the choice is plain PyTorch; kernels and graphs have tests of
their own.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unisparse_flex.block_masks.pages import PageSummaries
from unisparse_flex.integrations.vllm import Reason, decode_rows, read_counts
from unisparse_flex.integrations.vllm.options import Options

from .engine import ALL_BLOCKS, MAX_LENGTH, Answer, ask, differ_by, prompt_of, serving

PROMPTS = [prompt_of(length, length) for length in (1000, 640, 50, 257, 384, 1)]
TOLERANCE = 1e-4
TOKENS = 20
PAGES = {"block_size": 128}


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[Answer]:
    with serving(llama, None) as engine:
        return ask(engine, PROMPTS, tokens=TOKENS)


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({**ALL_BLOCKS, "decode": {"top_p": 1.0}}, PAGES),
        ({**ALL_BLOCKS, "decode": {"share": 1.0}}, {**PAGES, "max_num_batched_tokens": 640}),
        (
            {
                "selector": "UniSparse(block_size=64, top_p=1.0)",
                "min_length": 0,
                "decode": {"top_p": 1.0, "min_keys": 0},
            },
            {"block_size": 64, "max_num_batched_tokens": 100},
        ),
    ],
    ids=["whole", "chunks-640", "pages-64"],
)
def test_all_pages_answer_as_the_parent(
    llama: Path, expected: list[Answer], settings: dict[str, Any], options: dict[str, Any]
) -> None:
    with serving(llama, settings, **options) as engine:
        found = ask(engine, PROMPTS, tokens=TOKENS)
    assert differ_by(found, expected) < TOLERANCE
    counts = read_counts()
    # Every token but the first of an answer, most of them beside prefills of other requests or not.
    assert counts.decode_rows >= len(PROMPTS) * (TOKENS - 1)
    assert counts.kept_units == counts.visible_units > 0
    # The ends of prompts, of less than a block.
    assert counts.dense_rows[Reason.DECODE] <= len(PROMPTS)


def test_fewer_pages_are_read_and_the_last_ones_among_them(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = 0
    choose = decode_rows.choose_units

    def check(
        query: Tensor,
        summaries: PageSummaries,
        tables: Tensor,
        lengths: Tensor,
        *rest: Any,
        **more: Any,
    ) -> None:
        nonlocal checked
        assert_summaries_are_fresh(summaries, tables, lengths)
        choose(query, summaries, tables, lengths, *rest, **more)
        checked += lengths.shape[0]

    monkeypatch.setattr(decode_rows, "choose_units", check)
    settings = {**ALL_BLOCKS, "decode": {"budget": 256, "min_keys": 0}}
    with serving(llama, settings, block_size=64, max_num_batched_tokens=640) as engine:
        ask(engine, [prompt_of(n, n) for n in (1000, 1500, 30)], tokens=TOKENS)
    counts = read_counts()
    assert checked >= 2 * 3 * (TOKENS - 1)
    assert counts.kept_units < counts.visible_units / 2
    assert counts.kept_blocks == counts.visible_blocks


def assert_summaries_are_fresh(summaries: PageSummaries, tables: Tensor, lengths: Tensor) -> None:
    """Compares the summaries of requests with those of the keys that lie in their pages."""
    page = summaries.pages.shape[2]
    assert summaries.group == page
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    for table, length in zip(tables, lengths.tolist(), strict=True):
        for i in range(-(-length // page)):
            at = int(table[i])
            keys = summaries.pages[at][:, : length - i * page]
            close(summaries.means[at][:, 0], keys.mean(1))
            close(summaries.spreads[at][:, 0], keys.std(1, correction=0))


def test_summaries_stay_fresh_where_pages_are_shared_and_taken_over(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = decode_rows.choose_units
    checked = 0

    def check(*tensors: Any, **more: Any) -> None:
        nonlocal checked
        assert_summaries_are_fresh(*tensors[1:4])
        checked += 1
        choose(*tensors, **more)

    monkeypatch.setattr(decode_rows, "choose_units", check)
    shared = prompt_of(300, 1)
    prompts = [shared + prompt_of(length, length) for length in (200, 210, 190, 205, 60)]
    with serving(llama, None) as engine:
        expected = ask(engine, prompts, tokens=100)
    options: dict[str, Any] = {
        "block_size": 64,
        "max_model_len": 1024,
        "num_gpu_blocks_override": 30,
        "enable_prefix_caching": True,
        "disable_log_stats": False,
    }
    settings = {**ALL_BLOCKS, "decode": {"top_p": 1.0}}
    with serving(llama, settings, **options) as engine:
        found = ask(engine, prompts, tokens=100)
        metrics = {m.name: getattr(m, "value", 0) for m in engine.get_metrics()}
    assert checked > 100
    assert metrics["vllm:num_preemptions"] > 0
    assert metrics["vllm:prefix_cache_hits"] > 0
    assert differ_by(found, expected) < TOLERANCE


def test_a_cache_of_small_pages_decodes_densely_and_says_why(
    llama: Path, expected: list[Answer], caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**ALL_BLOCKS, "decode": {"budget": 128, "min_keys": 0}}
    with serving(llama, settings, block_size=32) as engine:
        found = ask(engine, PROMPTS, tokens=TOKENS)
    assert differ_by(found, expected) < TOLERANCE
    assert read_counts().decode_rows == 0
    assert str(Reason.DECODE_PAGE) in caplog.text


def test_the_cost_model_keeps_small_batches_dense(llama: Path) -> None:
    settings = {"selector": "UniSparse()", "decode": {"budget": 256}}
    with serving(llama, settings, **PAGES, max_num_batched_tokens=MAX_LENGTH) as engine:
        ask(engine, PROMPTS[:1], tokens=5)
    counts = read_counts()
    assert counts.decode_rows == 0
    assert counts.dense_rows[Reason.FEW_KEYS] == 4


@pytest.mark.parametrize(
    ("decode", "error", "words"),
    [
        ({"top_p": 2}, ValueError, "top_p must be"),
        ({"topp": 0.9}, ValueError, "decode must have names of"),
        ({}, TypeError, "decode must be a mapping"),
        ({"min_keys": 128}, ValueError, "decode must have top_p, budget or share"),
        ("fast", TypeError, "decode must be a mapping"),
    ],
)
def test_settings_of_decoding_are_checked(
    decode: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Options.read({"decode": decode})
