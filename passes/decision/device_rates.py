"""How fast a device works, as `python -m bench.cost_rates` measures it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRates:
    """Rates of one kind of device in one dtype; each is a symbol of `cost_model.attention_stages`.

    Those of the CPU are for one thread.

    Attributes:
        device: ``"cpu"``, or ``"cuda sm90"`` and the like; with ``" plain"`` after it where the
            GPU kernels do not score and select, but plain PyTorch does.
        dtype: Such as ``"bfloat16"``.
        source: The file they were fitted from, or what they are an estimate from.
        tile: Keys that dense attention reads at a time.
        dense_launch: Seconds a dense call takes beside its work.
        dense_flop_rate: FLOP/s of dense attention.
        dense_exp_rate: Exponentials a second of dense attention.
        select_launch: Seconds that scoring and selection take beside their work.
        scoring_flop_rate: FLOP/s of composite logits (float32).
        bandwidth: Bytes a second.
        sort_rate: Sort steps a second.
        sparse_launch: Seconds a call of the flex kernel takes beside its work.
        sparse_flop_rate: FLOP/s of the flex kernel.
        sparse_exp_rate: Exponentials a second of the flex kernel.
        block_seconds: Seconds a kept block of one head takes beside its work.
    """

    device: str
    dtype: str
    source: str
    tile: int
    dense_launch: float
    dense_flop_rate: float
    dense_exp_rate: float
    select_launch: float
    scoring_flop_rate: float
    bandwidth: float
    sort_rate: float
    sparse_launch: float
    sparse_flop_rate: float
    sparse_exp_rate: float
    block_seconds: float

    def on_threads(self, threads: int) -> DeviceRates:
        """The same device with its work spread evenly over ``threads``."""
        if threads == 1:
            return self
        names = [f.name for f in fields(self) if f.name.endswith("rate") or f.name == "bandwidth"]
        faster = {name: getattr(self, name) * threads for name in names}
        return replace(self, block_seconds=self.block_seconds / threads, **faster)


PLAIN = " plain"

# Fitted rates are copied from their source by hand; a test compares the two.
RATES = (
    DeviceRates(
        device="cpu",
        dtype="float32",
        source="bench/results/rates-cpu.json",
        tile=512,
        dense_launch=4.714e-10,
        dense_flop_rate=94250000000.0,
        dense_exp_rate=1961000000.0,
        select_launch=9.326e-05,
        scoring_flop_rate=254800000000.0,
        bandwidth=6793000000.0,
        sort_rate=25270000.0,
        sparse_launch=3.052e-10,
        sparse_flop_rate=76950000000.0,
        sparse_exp_rate=1130000000.0,
        block_seconds=1.45e-05,
    ),
    DeviceRates(
        device="cpu",
        dtype="bfloat16",
        source="bench/results/rates-cpu.json",
        tile=512,
        dense_launch=0.0002667,
        dense_flop_rate=75690000000.0,
        dense_exp_rate=155200000000000.0,
        select_launch=0.0002044,
        scoring_flop_rate=95050000000.0,
        bandwidth=6111000000.0,
        sort_rate=39060000.0,
        sparse_launch=0.0001305,
        sparse_flop_rate=40710000000.0,
        sparse_exp_rate=841700000.0,
        block_seconds=1.947e-05,
    ),
    DeviceRates(
        device="cuda sm90",
        dtype="bfloat16",
        source="bench/results/rates-cuda-sm90.json",
        tile=128,
        dense_launch=1.833e-05,
        dense_flop_rate=925700000000000.0,
        dense_exp_rate=3404000000000.0,
        select_launch=0.000494,
        scoring_flop_rate=1293000000000000.0,
        bandwidth=149600000000000.0,
        sort_rate=2.414e17,
        sparse_launch=8.498e-05,
        sparse_flop_rate=570200000000000.0,
        sparse_exp_rate=4911000000000.0,
        block_seconds=3.336e-09,
    ),
    DeviceRates(
        device="cuda sm90 plain",
        dtype="bfloat16",
        source="bench/results/rates-cuda-sm90-plain.json",
        tile=128,
        dense_launch=3.132e-05,
        dense_flop_rate=1089000000000000.0,
        dense_exp_rate=3127000000000.0,
        select_launch=0.0007851,
        scoring_flop_rate=182100000000000.0,
        bandwidth=1528000000000.0,
        sort_rate=2.748e16,
        sparse_launch=0.0001517,
        sparse_flop_rate=553700000000000.0,
        sparse_exp_rate=5002000000000.0,
        block_seconds=3.275e-09,
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundRates:
    """Rates for a device and dtype, and what they stand in for.

    Attributes:
        rates: The rates.
        note: Empty, or that there are none for this device and dtype and which are used.
    """

    rates: DeviceRates
    note: str = ""


def find_rates(device: torch.device, dtype: torch.dtype, *, plain: bool = False) -> FoundRates:
    """Rates of this machine's device; those of another dtype or device where there are none.

    Args:
        device: Where the call runs.
        dtype: Of its tensors.
        plain: Whether plain PyTorch scores and selects, not the GPU kernels.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    name = device_name(device.type, device.index)
    return _find_rates(name + PLAIN if plain and name != device.type else name, dtype, threads)


@lru_cache(maxsize=256)
def _find_rates(name: str, dtype: torch.dtype, threads: int) -> FoundRates:
    def distance(rates: DeviceRates) -> tuple[bool, bool, bool, int]:
        other_kind = rates.device.split()[0] != name.split()[0]
        other_way = rates.device.endswith(PLAIN) != name.endswith(PLAIN)
        known = getattr(torch, rates.dtype)
        return other_kind, other_way, rates.device != name, abs(known.itemsize - dtype.itemsize)

    wanted = str(dtype).removeprefix("torch.")
    exact = [rates for rates in RATES if (rates.device, rates.dtype) == (name, wanted)]
    nearest = exact[0] if exact else min(RATES, key=distance)
    note = ""
    if not exact:
        note = f"no rates for {wanted} on {name}, using {nearest.dtype} on {nearest.device}"
    return FoundRates(rates=nearest.on_threads(threads), note=note)


@lru_cache
def device_name(kind: str, index: int | None = None) -> str:
    """The key of a device among the rates: ``"cpu"``, or ``"cuda"`` with its architecture."""
    if kind != "cuda" or not torch.cuda.is_available():
        return kind
    major, minor = torch.cuda.get_device_capability(index)
    return f"cuda sm{major}{minor}"
