"""The cost model's expressions against counting loops, and its numbers against its expressions."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch

from unisparse_flex import UniSparse
from unisparse_flex.passes.decision import cost_model as cm
from unisparse_flex.passes.decision.cost_forecast import CallShape, break_even_length, forecast
from unisparse_flex.passes.decision.device_rates import RATES
from unisparse_flex.selectors import DEFAULT_SELECTOR, FlexPrefill

from .graphs import Stripes

RESULTS = Path(__file__).parents[2] / "bench/results"
LENGTHS = (128, 256, 384, 1024, 2048, 8192, 32768)
# (Sq, Skv, offset): square, ragged, aligned bottom-right, top-left with spare rows or keys.
CAUSAL = [
    (64, 64, 0),
    (50, 50, 0),
    (20, 60, 40),
    (17, 61, 44),
    (1, 33, 32),
    (70, 30, 0),
    (9, 40, 0),
]


def sizes(**changes: float) -> dict[sympy.Symbol, float]:
    """Values of every symbol of the shape and the settings."""
    values: dict[str, float] = {"B": 2, "Hq": 4, "Hkv": 2, "Sq": 64, "Skv": 64, "D": 8, "Dv": 6}
    values |= {
        "offset": 0,
        "masked": 0,
        "plain": 1,
        "itemsize": 2,
        "block": 16,
        "tile": 1,
        "density": 1,
    }
    values |= {"c_q": 4, "c_k": 8, "c_h": 2, "samples": 0} | changes
    return {symbol: values[symbol.name] for symbol in (*cm.SHAPE, *cm.SETTINGS)}


def shape(length: int, **changes: Any) -> CallShape:
    plain = CallShape(
        batch=1,
        q_heads=9,
        kv_heads=3,
        q_len=length,
        kv_len=length,
        head_dim=64,
        value_dim=64,
        is_causal=True,
        causal_lower_right=False,
        masked=False,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return plain._replace(**changes)


def seen(row: int, keys: int, offset: int, tile: int) -> int:
    """Keys that a kernel reads for a row, ``tile`` at a time."""
    tiles = range(0, keys, tile)
    return sum(min(tile, keys - start) for start in tiles if start <= row + offset)


@pytest.mark.parametrize(("q_len", "kv_len", "offset"), CAUSAL)
@pytest.mark.parametrize("tile", [1, 4, 7, 512])
def test_dense_work_is_that_of_counting_pairs(
    q_len: int, kv_len: int, offset: int, tile: int
) -> None:
    work = cm.attention_work(causal=True)
    at = sizes(Sq=q_len, Skv=kv_len, offset=offset, tile=tile)
    pairs = 2 * 4 * sum(seen(row, kv_len, offset, tile) for row in range(q_len))
    assert work.dense_exps.subs(at) == pairs
    assert work.dense_flops.subs(at) == pairs * (2 * 8 + 2 * 6)


@pytest.mark.parametrize(("q_len", "kv_len", "offset"), CAUSAL)
@pytest.mark.parametrize("block", [1, 8, 16])
def test_sparse_work_is_that_of_counting_blocks(
    q_len: int, kv_len: int, offset: int, block: int
) -> None:
    at = sizes(Sq=q_len, Skv=kv_len, offset=offset, block=block, density=0.25)
    last_rows = [min(start + block, q_len) - 1 for start in range(0, q_len, block)]
    blocks = sum(
        first_key <= row + offset for row in last_rows for first_key in range(0, kv_len, block)
    )
    work = cm.attention_work(causal=True)
    assert work.sparse_blocks.subs(at) == 2 * 4 * blocks / 4
    assert work.sparse_exps.subs(at) == 2 * 4 * blocks * block**2 / 4
    assert work.sparse_flops.subs(at) == 2 * 4 * blocks * block**2 / 4 * (2 * 8 + 2 * 6)


def test_selection_work_is_that_of_counting_composite_tokens() -> None:
    at = sizes(Sq=50, Skv=70)
    rows, columns, heads = 4 * 16 // 4, 5 * 16 // 8, 2
    cells = sum(1 for _ in range(2 * heads) for _ in range(rows) for _ in range(columns))
    work = cm.attention_work(causal=False)
    assert work.scoring_flops.subs(at) == cells * 2 * 8
    assert work.scoring_bytes.subs(at) == cells * 4 * 4
    tokens = 2 * 2 * 8 * (4 * 50 + 2 * 70) + 4 * 2 * 8 * (4 * rows + 2 * columns)
    assert work.pooling_bytes.subs(at) == tokens
    assert float(work.sort_steps.subs(at)) == pytest.approx(2 * (2 + 2 * 4) * 4 * 5 * math.log2(5))
    assert work.dense_flops.subs(at) == 2 * 2 * 4 * 50 * 70 * (8 + 6)


def test_bytes_count_what_is_read_and_written_once() -> None:
    work = cm.attention_work(causal=True)
    tensors = [2 * 4 * 64 * 8, 2 * 2 * 64 * 8, 2 * 2 * 64 * 6, 2 * 4 * 64 * 6]
    assert work.dense_bytes.subs(sizes()) == 2 * sum(tensors)
    assert work.dense_bytes.subs(sizes(masked=1)) == 2 * (sum(tensors) + 2 * 64 * 64)
    assert (work.scoring_bytes.subs(sizes(masked=1)) - work.scoring_bytes.subs(sizes())) == (
        2 * 64 * 64
    )


@pytest.mark.parametrize("causal", [False, True])
def test_at_density_one_sparse_attention_is_dense_attention(causal: bool) -> None:
    work = cm.attention_work(causal=causal)
    every = {cm.block: 1, cm.tile: 1, cm.density: 1}
    assert sympy.simplify(work.sparse_flops.subs(every) - work.dense_flops.subs(every)) == 0
    assert sympy.simplify(work.sparse_exps.subs(every) - work.dense_exps.subs(every)) == 0


def test_expressions_can_be_read() -> None:
    work = cm.attention_work(causal=False)
    assert str(work.dense_flops) == "2*B*Hq*Skv*Sq*(D + Dv)"
    assert str(work.dense_exps) == "B*Hq*Skv*Sq"
    causal = cm.attention_work(causal=True)
    square = causal.dense_exps.subs({cm.offset: 0, cm.tile: 1, cm.Skv: cm.Sq})
    assert sympy.simplify(square - cm.B * cm.Hq * cm.Sq * (cm.Sq + 1) / 2) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"is_causal": False, "causal_lower_right": True, "q_len": 300},
        {"is_causal": False},
    ],
)
def test_numbers_are_those_of_the_expressions(changes: Any) -> None:
    selector, rates = UniSparse.paper(), RATES[0]
    call = shape(
        1000, device=torch.device(rates.device.split()[0]), dtype=torch.bfloat16, **changes
    )
    found = forecast(call._replace(device=torch.device("cuda")), selector)
    cuda = next(r for r in RATES if r.device == "cuda sm90")
    offset = 700 if call.causal_lower_right else 0
    at = dict(zip(cm.SHAPE, (*call[:7], offset, 0, 0, 2), strict=True))
    at |= dict(zip(cm.SETTINGS, (128, 8, 8, 1, 0, found.density, cuda.tile), strict=True))
    every = cm.attention_stages(causal=call.is_causal or call.causal_lower_right)
    stages = {name: every[name] for name in ("dense", "select", "attend")}
    names = {name for stage in stages.values() for name in (*stage.constants, *stage.divided)}
    given = cuda.values()
    at |= {sympy.Symbol(name): given[name] for name in names}
    expected = [float(stage.seconds.subs(at)) for stage in stages.values()]
    assert [found.dense_seconds, found.select_seconds, found.attend_seconds] == pytest.approx(
        expected, rel=1e-9
    )
    assert found.sparse_seconds == pytest.approx(expected[1] + expected[2])


@pytest.mark.parametrize("rates", RATES, ids=lambda rates: f"{rates.device} {rates.dtype}")
def test_longer_calls_take_longer(rates: Any) -> None:
    device = torch.device(rates.device.split()[0])
    calls = [shape(n, dtype=getattr(torch, rates.dtype), device=device) for n in LENGTHS]
    found = [forecast(call, UniSparse()) for call in calls]
    for shorter, longer in pairwise(found):
        assert 0 < shorter.dense_seconds < longer.dense_seconds
        assert 0 < shorter.sparse_seconds < longer.sparse_seconds
        assert shorter.density >= longer.density


@pytest.mark.parametrize("q_len", [None, 512, 2048])
@pytest.mark.parametrize(
    "selector",
    [UniSparse(), UniSparse(top_k=8), Stripes(block_size=128), FlexPrefill()],
    ids=str,
)
def test_sparse_pays_from_the_break_even_on_and_not_just_below(
    selector: Any, q_len: int | None
) -> None:
    size, call = selector.block_size, shape(0)
    if q_len is not None:
        call = call._replace(q_len=q_len, is_causal=False, causal_lower_right=True)
    length = break_even_length(call, selector, self_attention=q_len is None)
    assert length is not None
    assert length % size == 0

    def pays(keys: int) -> bool:
        return forecast(call._replace(q_len=q_len or keys, kv_len=keys), selector).pays

    assert all(pays(keys) for keys in range(length, length + 40 * size, size))
    assert pays(64 * length)
    assert length <= max(size, q_len or 0) or not pays(length - size)


def test_keeping_everything_never_breaks_even() -> None:
    assert break_even_length(shape(0), UniSparse(top_p=1.0), self_attention=True) is None


@pytest.mark.parametrize("name", ["demo-code", "demo-prose"])
def test_expected_densities_are_near_those_of_the_demo(name: str) -> None:
    written = json.loads((RESULTS / f"{name}.json").read_text())
    selector = eval(written["options"]["selector"], {"UniSparse": UniSparse})
    measured = written["rows"][1]["density"]
    tokens = written["options"]["tokens"]
    assert forecast(shape(tokens), selector).density == pytest.approx(measured, rel=0.1)


def test_expected_densities_are_near_those_that_were_measured() -> None:
    rows = json.loads((RESULTS / "density-smollm2.json").read_text())["rows"]
    settings = {
        "paper": UniSparse.paper(),
        "default": DEFAULT_SELECTOR,
        "rows-alike": DEFAULT_SELECTOR,
    }
    rule = ("top_p", "threshold", "threshold_blocks")
    rules = [{field: row[field] for field in rule} for row in rows]
    selectors = [
        replace(settings[row["selector"]], **rule) for row, rule in zip(rows, rules, strict=True)
    ]
    calls = [shape(row["tokens"]) for row in rows]
    expected = [forecast(*pair).density for pair in zip(calls, selectors, strict=True)]
    for row, density in zip(rows, expected, strict=True):
        # At the same threshold the two texts differ by up to an eighth themselves.
        bound = 0.12 if row["selector"] == "paper" else 0.13
        assert density == pytest.approx(row["density"], rel=bound)


def test_expected_densities_follow_the_settings() -> None:
    def density(**settings: Any) -> float:
        return forecast(shape(4096), UniSparse(**settings)).density

    assert density(top_p=0.8) < density(top_p=0.95) < density(top_p=1.0) == 1.0
    visible, kept = 32 * 33 / 2, sum(min(4, row + 1) for row in range(31)) + 32
    assert density(top_k=4) == pytest.approx(kept / visible, rel=0.05)
    assert density(threshold=0.02) < density(threshold=0.005) < 1.0
    assert density(threshold=0.02, top_p=0.99) == density(top_p=0.99)
    assert density(threshold=0.02, top_p=0.1) == density(threshold=0.02)
    # Stated for more blocks than its rows have, a threshold is higher for these.
    assert density(threshold=0.01, threshold_blocks=64) < density(threshold=0.01)
    assert density(threshold=0.01, threshold_blocks=1) > density(threshold=0.01)
    assert density(top_p=0.8, sink_blocks=8) > density(top_p=0.8)
    assert forecast(shape(4096), Stripes()).density == 0.5
