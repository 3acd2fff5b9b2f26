"""What is timed as selection and as attention, and when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.calls import without_copies
from bench.quality import selection_share
from bench.quality.selection_share import ShareClock
from unisparse_flex import Selector, UniSparse
from unisparse_flex.evaluation.recall import CapturedAttention
from unisparse_flex.selectors import FlashPrefill

BLOCK, LENGTH = 16, 100
PAPER = [UniSparse(block_size=BLOCK, top_p=p) for p in (0.5, 0.8, 0.99)]
RIVAL: list[Selector] = [FlashPrefill(block_size=BLOCK, alpha=alpha) for alpha in (0.3, 0.01)]


def call(seed: int = 0, key_heads: int = 2) -> CapturedAttention:
    """Queries [1, 4, S, 16]; keys and values [1, 2, S, 16], repeated for more ``key_heads``."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 4, LENGTH, 16, generator=generator)
    key, value = torch.randn(2, 1, 2, LENGTH, 16, generator=generator).repeat_interleave(
        key_heads // 2, dim=2
    )
    return CapturedAttention(query=query, key=key, value=value, scale=0.3)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What every timed function returns; each is said to take 1, 2, 3, ... ms."""
    found: list[Any] = []

    def clock(function: Callable[[], Any], device: torch.device) -> float:
        found.append(function())
        return float(len(found))

    monkeypatch.setattr(selection_share, "_milliseconds", clock)
    return found


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what would be compiled and is not."""
    names: list[str] = []

    def leave(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        names.append(name)
        return function

    monkeypatch.setattr(selection_share, "compile_apart", leave)
    return names


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_selector_is_timed_once_and_attention_for_every_setting_and_call(
    runs: list[Any], compiled: list[str]
) -> None:
    clock = ShareClock([PAPER, RIVAL])
    first, second = (without_copies(call(seed), 2) for seed in (0, 1))
    measured = [(PAPER[0], first), (PAPER[2], first), (RIVAL[0], first), (PAPER[0], second)]
    rows = [clock.measure(selector, inputs) for selector, inputs in measured]
    assert [(row["selection_ms"], row["attention_ms"]) for row in rows] == [
        (1.0, 2.0),
        (1.0, 3.0),
        (4.0, 5.0),
        (1.0, 6.0),
    ]
    assert [row["selection_share"] for row in rows] == [1 / 3, 1 / 4, 4 / 9, 1 / 7]
    assert {row["selection_by"] for row in rows} == {"PyTorch"}
    assert compiled == ["attend_kept"]
    assert list(clock.selections) == [PAPER[1], RIVAL[1]]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("runs")
def test_selection_is_compiled_on_demand_once_for_a_selector(compiled: list[str]) -> None:
    clock = ShareClock([PAPER, RIVAL], compile_selection=True)
    inputs = without_copies(call(), 2)
    rows = [clock.measure(selector, inputs) for selector in (*PAPER, *RIVAL)]
    assert {row["selection_by"] for row in rows} == {"compiled PyTorch"}
    assert compiled == ["select_0", "attend_kept", "select_1"]


@pytest.mark.slow
def test_what_is_timed_are_the_lists_of_the_middle_and_attention_over_kept_blocks(
    runs: list[Any],
) -> None:
    inputs = without_copies(call(), 2)
    ShareClock([PAPER], compile_selection=True).measure(PAPER[0], inputs)
    lists, output = runs
    query, key = inputs.query, inputs.key
    middle = PAPER[1].select(query, key, is_causal=True, scale=0.3).block_lists()
    for found, expected in zip(lists, middle, strict=True):
        assert torch.equal(found, expected)
    mask = PAPER[0].select(query, key, is_causal=True, scale=0.3).token_mask()
    exact = F.scaled_dot_product_attention(
        query, key, inputs.value, attn_mask=mask, enable_gqa=True
    )
    assert not mask.all()
    torch.testing.assert_close(output, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("selector", [UniSparse(), FlashPrefill()], ids=lambda s: type(s).__name__)
def test_graphs_of_selection_and_attention_are_timed(selector: Selector) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    options: Any = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    query, key = torch.randn(1, 4, 1024, 64, **options), torch.randn(1, 2, 1024, 64, **options)
    inputs = without_copies(CapturedAttention(query=query, key=key, value=key, scale=None), 2)
    row = ShareClock([[selector]]).measure(selector, inputs)
    has_kernels = selector.select(query, key, is_causal=True).lists is not None
    assert row["selection_by"] == ("kernels" if has_kernels else "PyTorch")
    assert 0 < row["selection_share"] < 1


def test_repeated_heads_are_taken_once() -> None:
    plain, repeated = without_copies(call(), 2), without_copies(call(key_heads=4), 2)
    assert plain.key.shape[1] == plain.value.shape[1] == 2
    assert torch.equal(plain.key, repeated.key)
    assert torch.equal(plain.value, repeated.value)
    assert not torch.equal(plain.key, plain.value)
    assert repeated.key.is_contiguous()
    assert repeated.value.is_contiguous()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("compiled")
def test_on_the_cpu_the_median_of_one_thread_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def clock(function: Callable[[], Any], device: str, **options: Any) -> list[float]:
        threads.append(torch.get_num_threads())
        return [0.002, 0.003, 0.008]

    monkeypatch.setattr(selection_share, "measure", clock)
    before = torch.get_num_threads()
    row = ShareClock([PAPER]).measure(PAPER[0], without_copies(call(), 2))
    assert row["selection_ms"] == row["attention_ms"] == pytest.approx(3.0)
    assert (threads, torch.get_num_threads()) == ([1, 1], before)
