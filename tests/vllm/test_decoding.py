"""Sparse decoding in an engine: with every page it answers as its parent, with fewer it reads them.

The engine runs on the CPU, where the choice is plain PyTorch; kernels and graphs have tests of
their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unisparse_flex.block_masks.pages import UnitSummaries, choose_units
from unisparse_flex.block_masks.pages.summaries import LARGEST
from unisparse_flex.integrations.vllm import (
    Reason,
    create_backend,
    decode_rows,
    read_counts,
    reset_counts,
)
from unisparse_flex.integrations.vllm.cache_view import CacheView
from unisparse_flex.integrations.vllm.decode_rows import Schedule
from unisparse_flex.integrations.vllm.options import Options
from unisparse_flex.integrations.vllm.prompt_rows import pin_prompts
from unisparse_flex.integrations.vllm.warm_up import warm_up

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
    checked = checking_summaries(monkeypatch)
    settings = {**ALL_BLOCKS, "decode": {"budget": 256, "min_keys": 0}}
    with serving(llama, settings, block_size=64, max_num_batched_tokens=640) as engine:
        ask(engine, [prompt_of(n, n) for n in (1000, 1500, 30)], tokens=TOKENS)
    counts = read_counts()
    assert sum(checked) >= 2 * 3 * (TOKENS - 1)
    assert counts.kept_units < counts.visible_units / 2
    assert counts.kept_blocks == counts.visible_blocks


def checking_summaries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Checks what decoding chose by; the list has the rows of every choice."""
    found: list[int] = []
    attend = decode_rows.attend_decode

    def check(impl: Any, layer: Any, kernel: Any, view: CacheView, *rest: Any) -> None:
        summaries, _, rows = rest[:3]
        attend(impl, layer, kernel, view, *rest)
        assert_summaries_are_fresh(view.pages, summaries.units, rows.tables, rows.lengths)
        found.append(rows.lengths.shape[0])

    monkeypatch.setattr(create_backend, "attend_decode", check)
    return found


def assert_summaries_are_fresh(
    cache: Tensor, units: UnitSummaries, tables: Tensor, lengths: Tensor
) -> None:
    """Compares the summaries of requests with those of the keys that lie in their pages."""
    page = cache.shape[2]
    assert units.unit == page
    for table, length in zip(tables, lengths.tolist(), strict=True):
        for i in range(-(-length // page)):
            at = int(table[i])
            keys = cache[at][:, : length - i * page]
            wanted = keys.mean(1), keys.std(1, correction=0)
            for found, fresh in zip(units.read(torch.tensor(at)), wanted, strict=True):
                scale = fresh.abs().amax(-1, keepdim=True) / LARGEST
                assert bool(((found[:, 0] - fresh).abs() <= 0.51 * scale + 1e-6).all())


def test_what_the_ends_of_prompts_look_at_is_read_by_every_token(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin, choose = pin_prompts, choose_units
    ended: list[int] = []
    read: list[int] = []

    def pins(impl: Any, view: CacheView, units: UnitSummaries, *rest: Any) -> None:
        pin(impl, view, units, *rest)
        selector, rows, tables, _ = rest
        for row in rows:
            count = -(-row.length // units.unit)
            stays = units.read_pinned(tables[row.index, None, :count].long())[0]
            rule = selector.rule
            assert not stays[:, : rule.sinks].any()
            assert not stays[:, max(0, count - rule.last) :].any()
            wanted = min(4, max(0, count - rule.sinks - rule.last))
            assert stays.sum(-1).tolist() == [wanted] * len(stays)
            ended.append(row.length)

    def chooses(
        query: Tensor, units: UnitSummaries, tables: Tensor, lengths: Tensor, out: Any, **rest: Any
    ) -> None:
        choose(query, units, tables, lengths, out, **rest)
        heads, per_page = units.numbers.shape[1:3]
        for request, length in enumerate(lengths.tolist()):
            at = tables[request, : -(-length // units.page)].long()
            stays = units.read_pinned(at[None])[0]
            for head in range(heads):
                pages = at[stays[head].nonzero().flatten() // per_page]
                step, apart, _ = rest["steps"]
                sequence = request * heads + head
                kept = out.tables[sequence, : -(-int(out.lengths[sequence]) // units.unit)]
                assert {int(page) * step + head * apart for page in pages} <= set(kept.tolist())
                read.append(len(pages))

    monkeypatch.setattr(create_backend, "pin_prompts", pins)
    monkeypatch.setattr(decode_rows, "choose_units", chooses)
    settings = {**ALL_BLOCKS, "decode": {"budget": 256, "min_keys": 0, "prompt_share": 1.0}}
    with serving(llama, settings, block_size=64, max_num_batched_tokens=640) as engine:
        ask(engine, [prompt_of(n, n) for n in (1000, 1500, 30)], tokens=TOKENS)
    assert set(ended) >= {1000, 1500, 30}
    assert max(read) == 4


def test_summaries_stay_fresh_where_pages_are_shared_and_taken_over(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = checking_summaries(monkeypatch)
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
    assert sum(checked) > 100
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


def test_the_warm_up_leaves_nothing_behind(llama: Path) -> None:
    settings = {**ALL_BLOCKS, "decode": {"share": 0.5}}
    with serving(llama, settings, **PAGES, max_num_batched_tokens=640) as engine:
        # The layers meet their caches at the first step.
        ask(engine, [prompt_of(5, 5)], tokens=2)
        config = engine.llm_engine.vllm_config
        layers = list(config.compilation_config.static_forward_context.values())
        before = read_counts()
        with torch.inference_mode():
            warm_up([(layer, layer.impl.unisparse) for layer in layers], 640, 1024)
        assert read_counts() == before
        assert all(layer.impl.unisparse.space is not None for layer in layers)


def test_the_cost_model_keeps_small_batches_dense(llama: Path) -> None:
    settings = {"selector": "UniSparse()", "decode": {"budget": 600}}
    with serving(llama, settings, **PAGES, max_num_batched_tokens=MAX_LENGTH) as engine:
        ask(engine, PROMPTS[:1], tokens=5)
    counts = read_counts()
    assert counts.decode_rows == 0
    assert counts.dense_rows[Reason.FEW_KEYS] == 4


def test_short_requests_beside_long_ones_are_read_whole(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unisparse_flex.integrations.vllm import create_backend

    monkeypatch.setattr(create_backend, "DECODE_KEYS", 1400)
    settings = {"selector": "UniSparse()", "decode": {"share": 0.1, "min_keys": 0}}
    prompts = [prompt_of(length, length) for length in (1200, 600)]
    densities = []
    with serving(llama, settings, **PAGES, max_num_batched_tokens=MAX_LENGTH) as engine:
        for some in ([prompts[0], prompts[0]], prompts):
            reset_counts()
            ask(engine, some, tokens=4)
            densities.append(read_counts().decode_density)
    # 600 of 1800 keys are read whole, of a request of 700 keys or fewer.
    assert densities[0] < 0.5
    assert densities[1] > 1 / 3 + 2 / 3 * densities[0] - 0.02


@pytest.mark.parametrize("is_plain", [True, False])
def test_batches_of_a_graph_decode_as_it_was_recorded(
    llama: Path, monkeypatch: pytest.MonkeyPatch, is_plain: bool
) -> None:
    from unisparse_flex.integrations.vllm.cpu import CpuBackend

    builder = CpuBackend.get_builder_cls()
    decode = builder._decode

    def recorded(self: Any, common: Any, prefix: int) -> Any:
        # Requests as long as the engine admits would be worth a choice.
        self.captured, self.longest = {1}, 10**6
        return decode(self, common if is_plain else common.replace(mm_req_doc_ranges={}), prefix)

    monkeypatch.setattr(builder, "_decode", recorded)
    settings = {"selector": "UniSparse()", "decode": {"budget": 600}}
    with serving(llama, settings, **PAGES, max_num_batched_tokens=MAX_LENGTH) as engine:
        ask(engine, PROMPTS[:1], tokens=5)
    counts = read_counts()
    assert counts.decode_rows == 4 * is_plain
    # By the kernels of the graph, which read it whole: it is short.
    assert counts.decode_density == float(is_plain)
    assert Reason.FEW_KEYS not in counts.dense_rows
    # What is refused is, in a graph too.
    assert counts.dense_rows.get(Reason.PREFIX_IMAGES, 0) == 4 * (not is_plain)


@pytest.mark.parametrize(
    ("decode", "error", "words"),
    [
        ({"top_p": 2}, ValueError, "top_p must be"),
        ({"topp": 0.9}, ValueError, "decode must have names of"),
        ({}, TypeError, "decode must be a mapping"),
        ({"min_keys": 128}, ValueError, "decode must have top_p, budget or share"),
        ({"budget": 10}, ValueError, "budget of at least min_keys, 512"),
        ("fast", TypeError, "decode must be a mapping"),
    ],
)
def test_settings_of_decoding_are_checked(
    decode: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Options.read({"decode": decode})


def test_a_schedule_is_made_once_a_forward() -> None:
    schedule = Schedule()
    made: list[torch.Tensor] = []

    def make() -> torch.Tensor:
        made.append(torch.tensor(len(made)))
        return made[-1]

    layers = [object(), object(), object()]
    for forward in range(3):
        for layer in layers:
            assert schedule.read(layer, make) is made[forward]
    assert len(made) == 3
