"""What a GPU says of itself, and the rates that follow from those of one that was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from .device_rates import DeviceRates

# FLOPs that the tensor cores of a multiprocessor do in a clock, in 16 bits with sums in 32, by
# compute capability; of the next lower one where it is not listed.
FLOPS_A_CLOCK = {
    (8, 0): 2048,
    (8, 6): 512,
    (8, 9): 512,
    (9, 0): 4096,
    (10, 0): 8192,
    (12, 0): 512,
}
# So much of the speed that an estimate gives sparse attention and selection is believed: a call
# that is dense though sparse would be a little faster costs less than the other mistake.
CAUTION = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFacts:
    """A GPU as it reports itself.

    Attributes:
        name: Of the product.
        capability: Compute capability.
        multiprocessors: How many.
        clock: Their highest frequency in Hz.
        bandwidth: Bytes a second between the GPU and its memory.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock: float
    bandwidth: float

    @property
    def clocks(self) -> float:
        """Clocks a second of all multiprocessors."""
        return self.multiprocessors * self.clock

    @property
    def tensor_rate(self) -> float:
        """FLOP/s of its tensor cores at most."""
        known = [found for found in FLOPS_A_CLOCK if found <= self.capability]
        return FLOPS_A_CLOCK[max(known, default=min(FLOPS_A_CLOCK))] * self.clocks


def _published(
    name: str, capability: tuple[int, int], multiprocessors: int, mhz: float, gb: float
) -> DeviceFacts:
    return DeviceFacts(
        name=name,
        capability=capability,
        multiprocessors=multiprocessors,
        clock=mhz * 1e6,
        bandwidth=gb * 1e9,
    )


# As NVIDIA's data sheets have them: boost clocks in MHz, memory in GB/s.
PUBLISHED = (
    _published("A100 SXM 80GB", (8, 0), 108, 1410, 2039),
    _published("GeForce RTX 3090", (8, 6), 82, 1695, 936),
    _published("GeForce RTX 4090", (8, 9), 128, 2520, 1008),
    _published("L40S", (8, 9), 142, 2520, 864),
    _published("H200 SXM", (9, 0), 132, 1980, 4800),
    _published("B200", (10, 0), 148, 1850, 8000),
    _published("GeForce RTX 5090", (12, 0), 170, 2407, 1792),
)
# Those of which the project measured the rates, by their key among these.
MEASURED = {"cuda sm90": next(facts for facts in PUBLISHED if facts.name == "H200 SXM")}


@cache
def facts_of(index: int) -> DeviceFacts | None:
    """What a CUDA device reports; ``None`` where this torch does not tell."""
    found = torch.cuda.get_device_properties(index)
    names = ("clock_rate", "memory_clock_rate", "memory_bus_width")
    if not all(getattr(found, name, 0) for name in names):
        return None
    return DeviceFacts(
        name=found.name,
        capability=(found.major, found.minor),
        multiprocessors=found.multi_processor_count,
        clock=found.clock_rate * 1e3,
        # In kHz, two transfers a clock; in bits.
        bandwidth=found.memory_clock_rate * 1e3 * 2 * found.memory_bus_width / 8,
    )


def estimate(rates: DeviceRates, measured: DeviceFacts, facts: DeviceFacts) -> DeviceRates:
    """Rates of a GPU that nobody measured, by what it has of what a measured one has.

    Products scale with the tensor cores, exponentials and what programs do beside them with the
    multiprocessors and their clock, bytes with the memory; launches and Python take as long.

    Args:
        rates: Of the measured device.
        measured: What that device is.
        facts: What this one is.
    """
    products = facts.tensor_rate / measured.tensor_rate
    programs = facts.clocks / measured.clocks
    faster = {
        "dense_flop_rate": products,
        "masked_flop_rate": products,
        "sparse_flop_rate": products * CAUTION,
        "scoring_flop_rate": products * CAUTION,
        "dense_exp_rate": programs,
        "masked_exp_rate": programs,
        "sparse_exp_rate": programs * CAUTION,
        "sort_rate": programs * CAUTION,
        "bandwidth": facts.bandwidth / measured.bandwidth,
    }
    major, minor = facts.capability
    plain = rates.device.removeprefix(rates.device.split(" plain")[0])
    return replace(
        rates,
        device=f"cuda sm{major}{minor}{plain}",
        source=f"estimate: {rates.source}, by what the GPU reports of itself",
        block_seconds=rates.block_seconds / (programs * CAUTION),
        **{name: getattr(rates, name) * factor for name, factor in faster.items()},
    )
