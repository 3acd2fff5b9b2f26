"""Rates: those that were measured, found by device and dtype, spread over threads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unisparse_flex import UniSparse
from unisparse_flex.passes.decision import found_rates
from unisparse_flex.passes.decision.cost_forecast import break_even_length, forecast
from unisparse_flex.passes.decision.device_rates import RATES, DeviceRates, read_rates
from unisparse_flex.passes.decision.found_rates import device_name, find_rates
from unisparse_flex.selectors import DEFAULT_SELECTOR

from .test_cost_model import shape

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "passes/decision/rates"
MEASURED = sorted((ROOT / "bench/results").glob("rates-*.json"))
LABELS = ("device", "dtype", "source")


def fitted() -> list[Any]:
    """Every dtype of every result file. An estimate in RATES gives way to a file of its device."""
    written = [(path, json.loads(path.read_text())) for path in MEASURED]
    return [
        pytest.param(path, result, dtype, id=f"{path.stem} {dtype}")
        for path, result in written
        for dtype in result["rates"]
    ]


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_the_library_reads_what_was_measured(path: Path) -> None:
    shipped = SHIPPED / path.name.removeprefix("rates-")
    written = json.loads(shipped.read_text())
    result = json.loads(path.read_text())
    assert written == {"source": f"bench/results/{path.name}"} | {
        name: result[name] for name in ("device", "hardware", "versions", "rates")
    }
    assert [rates for rates in RATES if rates.source == written["source"]] == read_rates(
        shipped.read_text()
    )


def test_every_file_that_the_library_reads_was_measured() -> None:
    names = {path.name.removeprefix("rates-") for path in MEASURED}
    assert {path.name for path in SHIPPED.iterdir()} == names


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"device": "x", "source": "y", "rates": {"z": {}}}']
)
def test_what_is_no_file_of_rates_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a file of rates must be JSON with device, source"):
        read_rates(text)


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_no_bandwidth_is_above_what_the_device_reports(path: Path) -> None:
    result = json.loads(path.read_text())
    for rates in result["rates"].values():
        assert rates["bandwidth"] <= (result.get("peak_bandwidth") or 2e12)


@pytest.mark.parametrize("rates", RATES, ids=lambda rates: f"{rates.device} {rates.dtype}")
def test_rates_name_a_file_or_say_that_they_are_an_estimate(rates: DeviceRates) -> None:
    measured = [path.relative_to(ROOT).as_posix() for path in MEASURED]
    assert rates.source in measured or rates.source.startswith("estimate: ")


@pytest.mark.parametrize(("path", "result", "dtype"), fitted())
def test_measurements_passed_their_gate_and_predict_shapes_that_were_left_out(
    path: Path, result: Any, dtype: str
) -> None:
    rows = [row for row in result["rows"] if row["dtype"] == dtype]
    assert all("relative_error" in row for row in rows if row["stage"] == "gate")
    assert result["errors"][dtype]["held_out_shapes"]["sum"]["median"] < 0.15


def test_each_device_and_dtype_has_one_entry() -> None:
    keys = [(rates.device, rates.dtype) for rates in RATES]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_devices_use_their_own_rates(dtype: torch.dtype) -> None:
    found = find_rates(torch.device("cpu"), dtype)
    # Of one CPU for all: which is said.
    assert (found.rates.device, "of one CPU" in found.note) == ("cpu", True)
    assert found.rates.dtype == str(dtype).removeprefix("torch.")


def test_what_has_no_rates_says_whose_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_rates(torch.device("cpu"), torch.float16)
    assert found.rates.dtype == "bfloat16"
    assert found.note == "no rates for float16 on cpu, using bfloat16 on cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "some GPU")
    monkeypatch.setattr(found_rates, "facts_of", lambda index: None)
    device_name.cache_clear()
    try:
        note = find_rates(torch.device("cuda", 0), torch.bfloat16).note
    finally:
        device_name.cache_clear()
    assert note == "no rates for bfloat16 on cuda sm120, using bfloat16 on cuda sm90"


def test_more_threads_are_faster_but_no_different_at_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = next(rates for rates in RATES if rates.device == "cpu")
    four = one.on_threads(4)
    assert four.dense_flop_rate == 4 * one.dense_flop_rate
    assert four.block_seconds == one.block_seconds / 4
    assert four.dense_launch == one.dense_launch
    assert one.on_threads(1) is one


def test_the_readme_names_the_break_even_on_an_h200() -> None:
    llama = shape(0, q_heads=32, kv_heads=8, head_dim=128, value_dim=128, dtype=torch.bfloat16)
    cuda = llama._replace(device=torch.device("cuda"))
    length = break_even_length(cuda, DEFAULT_SELECTOR, self_attention=True)
    assert length is not None
    named = f"shorter than about {round(length, -2)} tokens"
    readme = (ROOT / "README.md").read_text()
    assert named in readme
    masked = break_even_length(cuda._replace(masked=True), DEFAULT_SELECTOR, self_attention=True)
    assert masked is not None
    assert f"shorter than about {round(masked, -2)} under a mask" in readme


def test_predictions_are_milliseconds_not_microseconds() -> None:
    # 4 * 64 FLOPs a pair at 1 to 10 TFLOP/s a core would be a mistake of units.
    found = forecast(shape(4096), UniSparse())
    assert 0.001 < found.dense_seconds * torch.get_num_threads() < 10
