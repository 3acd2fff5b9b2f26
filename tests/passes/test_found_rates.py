"""Rates of devices that nobody measured, and of those that their user did."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unisparse_flex.passes.decision import cost_forecast, found_rates, stored_rates
from unisparse_flex.passes.decision.cost_forecast import break_even_length, forecast_at
from unisparse_flex.passes.decision.device_facts import MEASURED, PUBLISHED, DeviceFacts, estimate
from unisparse_flex.passes.decision.device_rates import RATES
from unisparse_flex.selectors import DEFAULT_SELECTOR

from .test_cost_model import shape

HOPPER = MEASURED["cuda sm90"]
OTHERS = [facts for facts in PUBLISHED if facts is not HOPPER]
MEASURED_RATES = next(rates for rates in RATES if rates.device == "cuda sm90")
LLAMA = shape(
    8192,
    q_heads=32,
    kv_heads=8,
    head_dim=128,
    value_dim=128,
    dtype=torch.bfloat16,
    device=torch.device("cuda"),
)


CACHES = (
    found_rates._find_rates,
    found_rates.device_name,
    stored_rates.load_stored,
    cost_forecast.forecast,
    cost_forecast._break_even_length,
)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    for cached in CACHES:
        cached.cache_clear()


def is_gpu(
    patch: pytest.MonkeyPatch, facts: DeviceFacts | None, capability: tuple[int, int]
) -> None:
    """This machine has one GPU, which reports these facts."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    patch.setattr(torch.cuda, "get_device_name", lambda index=None: "some GPU")
    patch.setattr(found_rates, "facts_of", lambda index: facts)
    found_rates.device_name.cache_clear()


@pytest.mark.parametrize("facts", PUBLISHED, ids=lambda facts: facts.name)
def test_products_are_as_fast_as_the_data_sheet_says(facts: DeviceFacts) -> None:
    tera = {
        "A100 SXM 80GB": 312,
        "GeForce RTX 3090": 71,
        "GeForce RTX 4090": 165,
        # Twice as much: sums in 32 bits are not slower there.
        "L40S": 362 / 2,
        "H200 SXM": 989,
        "B200": 2250,
        "GeForce RTX 5090": 209.5,
    }
    assert facts.tensor_rate / 1e12 == pytest.approx(tera[facts.name], rel=0.09)


def test_an_unknown_architecture_counts_as_the_next_lower_one() -> None:
    later = replace(HOPPER, capability=(9, 5))
    assert later.tensor_rate == HOPPER.tensor_rate
    assert replace(HOPPER, capability=(7, 5)).tensor_rate > 0


@pytest.mark.parametrize("facts", OTHERS, ids=lambda facts: facts.name)
def test_an_estimate_errs_towards_dense(facts: DeviceFacts) -> None:
    cautious = estimate(MEASURED_RATES, HOPPER, facts)
    plain = {"sparse_flop_rate", "sparse_exp_rate", "scoring_flop_rate", "block_seconds"}
    for length in (2048, 8192, 32768):
        call = LLAMA._replace(q_len=length, kv_len=length)
        found = forecast_at(call, DEFAULT_SELECTOR, cautious)
        # The same without caution.
        eager = replace(
            cautious,
            **{
                name: getattr(cautious, name) * (0.8 if name == "block_seconds" else 1 / 0.8)
                for name in plain
            },
        )
        assert found.dense_seconds == forecast_at(call, DEFAULT_SELECTOR, eager).dense_seconds
        assert found.sparse_seconds > forecast_at(call, DEFAULT_SELECTOR, eager).sparse_seconds
    assert cautious.source.startswith("estimate: ")
    assert cautious.bandwidth <= facts.bandwidth


def test_the_measured_gpu_estimates_itself_but_for_caution() -> None:
    found = estimate(MEASURED_RATES, HOPPER, HOPPER)
    assert found.device == "cuda sm90"
    assert found.dense_flop_rate == MEASURED_RATES.dense_flop_rate
    assert found.sparse_flop_rate == pytest.approx(0.8 * MEASURED_RATES.sparse_flop_rate)


@pytest.mark.parametrize("facts", OTHERS, ids=lambda facts: facts.name)
def test_a_gpu_that_nobody_measured_has_an_estimate(
    facts: DeviceFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_gpu(monkeypatch, facts, facts.capability)
    for plain in (False, True):
        found = found_rates.find_rates(torch.device("cuda", 0), torch.bfloat16, plain=plain)
        major, minor = facts.capability
        assert found.rates.device == f"cuda sm{major}{minor}" + " plain" * plain
        assert found.rates.is_plain is plain
        assert "an estimate by what the " + facts.name in found.note
    monkeypatch.setattr(found_rates, "facts_of", lambda index: None)
    found_rates._find_rates.cache_clear()
    found = found_rates.find_rates(torch.device("cuda", 0), torch.bfloat16)
    assert found.rates == MEASURED_RATES
    assert "using bfloat16 on cuda sm90" in found.note


def test_a_gpu_of_a_measured_kind_has_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    is_gpu(monkeypatch, replace(HOPPER, multiprocessors=114), (9, 0))
    found = found_rates.find_rates(torch.device("cuda", 0), torch.bfloat16)
    assert (found.rates, found.note) == (MEASURED_RATES, "")


def test_a_mask_that_plain_pytorch_reads_costs_dense_attention_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_gpu(monkeypatch, None, (9, 0))
    plain = found_rates.find_rates(torch.device("cuda", 0), torch.bfloat16, plain=True).rates
    assert plain.is_plain
    # Two runs on one kind of GPU.
    assert plain.masked_flop_rate == pytest.approx(MEASURED_RATES.masked_flop_rate, rel=0.1)
    call = LLAMA._replace(q_len=32768, kv_len=32768, plain=True)
    free, masked = (
        forecast_at(call._replace(masked=flag), DEFAULT_SELECTOR, plain) for flag in (False, True)
    )
    assert masked.dense_seconds > 3 * free.dense_seconds


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(found_rates, "load_stored", stored_rates.load_stored)
    return tmp_path


def test_rates_of_the_user_go_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = OTHERS[0]
    is_gpu(monkeypatch, facts, facts.capability)
    own = replace(estimate(MEASURED_RATES, HOPPER, facts), sparse_launch=0.5)
    path = found_rates.keep_rates(own, "some GPU")
    assert folder in path.parents
    found = found_rates.find_rates(torch.device("cuda", 0), torch.bfloat16)
    assert found.rates == replace(own, source=stored_rates.SOURCE)
    assert found.note == ""
    # A dtype that was not measured takes those of the device before those of others.
    other = found_rates.find_rates(torch.device("cuda", 0), torch.float32)
    assert other.rates == found.rates
    assert "using bfloat16 on cuda sm80" in other.note
    call = LLAMA._replace(q_len=0, kv_len=0)
    assert break_even_length(call, DEFAULT_SELECTOR, self_attention=True)


@pytest.mark.parametrize(
    "change", ["hardware", "torch", "unisparse-flex", "broken", "other device"]
)
def test_rates_of_other_hardware_or_versions_are_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    own = replace(next(r for r in RATES if r.device == "cpu"), sparse_launch=0.5)
    hardware = found_rates.hardware_name("cpu")
    path = found_rates.keep_rates(own, hardware)
    device, dtype = torch.device("cpu"), getattr(torch, own.dtype)
    assert found_rates.find_rates(device, dtype).rates.sparse_launch == 0.5
    content = json.loads(path.read_text())
    if change == "hardware":
        content["hardware"] = "another CPU"
    elif change == "broken":
        del content["rates"][own.dtype]["tile"]
    elif change == "other device":
        content["device"] = "cuda sm90"
    else:
        content["versions"][change] = "0.0"
    path.write_text(json.dumps(content))
    stored_rates.load_stored.cache_clear()
    found_rates._find_rates.cache_clear()
    found = found_rates.find_rates(device, dtype)
    assert found.rates.sparse_launch != 0.5
    assert "of one CPU" in found.note
