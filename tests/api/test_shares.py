"""Shares of blocks in words: what is not all of them never reads 100 %."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from unisparse_flex.cli.quality import say_verdict as say_quality
from unisparse_flex.cli.speed import say_verdict as say_speed
from unisparse_flex.command_line import CommandLine
from unisparse_flex.reports import AttentionRecord, Explanation
from unisparse_flex.reports.page import format_percent
from unisparse_flex.shares import keep_part, say_share, say_tenths

ALL, NOTHING = ("100%", "100.0%", "1.000"), ("0%", "0.0%", "0.000")


@pytest.mark.parametrize(
    ("share", "whole", "tenths"),
    [
        (0.0, "0%", "0.0%"),
        (1e-9, "0.1%", "0.1%"),
        (0.004, "0.4%", "0.4%"),
        (0.25, "25%", "25.0%"),
        (0.9949, "99%", "99.5%"),
        (0.995, "99.5%", "99.5%"),
        (0.996, "99.6%", "99.6%"),
        (0.9999, "99.9%", "99.9%"),
        (1.0, "100%", "100.0%"),
    ],
)
def test_shares_in_percent(share: float, whole: str, tenths: str) -> None:
    assert (say_share(share), say_tenths(share)) == (whole, tenths)


@pytest.mark.parametrize("say", [say_share, say_tenths])
@given(share=st.floats(0.0, 1.0))
@example(share=0.9995)
@example(share=1.0 - 1e-9)
@example(share=5e-324)
def test_only_all_is_100_percent_and_only_nothing_0(
    say: Callable[[float], str], share: float
) -> None:
    said = say(share)
    assert (said in ALL) is (share == 1.0)
    assert (said in NOTHING) is (share == 0.0)
    assert abs(float(said.rstrip("%")) / 100 - share) < 0.0051


@dataclass(frozen=True)
class Said:
    """What says a density, by the density that it is given."""

    name: str
    say: Callable[[float], str]


def explained(density: float) -> str:
    calls = tuple(
        AttentionRecord(layer=f"layers.{i}", q_len=8, kv_len=8, decision="sparse", density=density)
        for i in range(2)
    )
    found = Explanation(calls)
    return f"{found.verdict}\n{found.table()}"


def judged(density: float) -> str:
    mean = {"tokens": 9, "setting": "high", "density": density, "kl": 1e-9}
    return " ".join(say_quality([mean | {"perplexity_ratio": 1.1, "top1_agreement": 0.5}], "high"))


def timed(density: float) -> str:
    row = {"tokens": 9, "setting": "high", "error": None, "sparse_calls": 2, "density": density}
    row |= {"ms": 10.0, "times_ms": [10.0, 10.0], "told_apart": True, "speedup": 1.5, "windows": 0}
    return " ".join(say_speed([row | {"output_error": None}], CommandLine()))


@pytest.mark.parametrize(
    "said",
    [
        Said("explain", explained),
        Said("quality", judged),
        Said("speed", timed),
        Said("page", format_percent),
        Said("table", lambda density: f"{keep_part(density, decimals=3):.3f}"),
    ],
    ids=lambda said: said.name,
)
def test_what_commands_print_never_rounds_to_all_or_nothing(said: Said) -> None:
    for density in (0.0004, 0.996, 0.99999):
        words = said.say(density).replace(",", " ").split()
        assert not {*ALL, *NOTHING} & set(words), said.say(density)
    assert {*ALL} & set(said.say(1.0).replace(",", " ").split())
