"""The rates of the device that a call runs on: the user's own, the project's, or an estimate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from .device_facts import MEASURED, DeviceFacts, estimate, facts_of
from .device_rates import PLAIN, RATES, DeviceRates
from .stored_rates import load_stored, store

# Of which calls a user measures rates.
USUAL_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
MEASURE = "unisparse-flex doctor --measure measures this machine, in about a minute"
OF_ONE_CPU = "predicted by rates of one CPU, which come with the package"


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundRates:
    """Rates for a device and dtype, and what they stand in for.

    Attributes:
        rates: The rates.
        note: Empty, or that nobody measured this device and dtype, and what is taken instead.
        way_out: Empty, or what would measure them.
    """

    rates: DeviceRates
    note: str = ""
    way_out: str = ""

    @property
    def remark(self) -> str:
        """The note, and what there is to do."""
        return "; ".join(part for part in (self.note, self.way_out) if part)


def find_rates(
    device: torch.device, dtype: torch.dtype, *, plain: bool = False, threads: int | None = None
) -> FoundRates:
    """Rates of this machine's device.

    Those that its user measured (``unisparse-flex doctor --measure``) go before those that the
    project measured on its kind; a GPU of another kind has an estimate by what it reports of
    itself, and anything else the rates of another dtype or device.

    Args:
        device: Where the call runs.
        dtype: Of its tensors.
        plain: Whether plain PyTorch scores and selects, not the GPU kernels.
        threads: Of the CPU; those of torch by default.
    """
    if device.type != "cpu":
        threads = 1
    elif threads is None:
        threads = torch.get_num_threads()
    name = device_name(device.type, device.index)
    is_plain = plain and name != device.type
    return _find_rates(name + PLAIN if is_plain else name, device.index or 0, dtype, threads)


@lru_cache(maxsize=256)
def _find_rates(name: str, index: int, dtype: torch.dtype, threads: int) -> FoundRates:
    kind = name.split()[0]
    wanted = str(dtype).removeprefix("torch.")
    stored = load_stored(name, hardware_name(kind, index))
    way_out = MEASURE if USUAL_DTYPES.get(kind) == dtype else ""
    for known in (stored, RATES):
        for rates in known:
            if (rates.device, rates.dtype) == (name, wanted):
                on_threads = rates.on_threads(threads)
                if known is stored or kind != "cpu":
                    return FoundRates(rates=on_threads)
                # CPUs of one name among the rates differ in speed.
                return FoundRates(rates=on_threads, note=OF_ONE_CPU, way_out=way_out)
    estimated = _estimates(name, index)
    nearest = min((*stored, *estimated, *RATES), key=lambda rates: _distance(rates, name, dtype))
    if any(nearest is rates for rates in estimated):
        facts = facts_of(index)
        assert facts is not None
        note = f"no rates measured on {name}, an estimate by what the {facts.name} reports"
        if nearest.dtype != wanted:
            note += f", of {nearest.dtype}"
    else:
        note = f"no rates for {wanted} on {name}, using {nearest.dtype} on {nearest.device}"
    return FoundRates(rates=nearest.on_threads(threads), note=note, way_out=way_out)


def keep_rates(rates: DeviceRates, hardware: str) -> Path:
    """Keeps rates that a user measured; this process, too, takes them from now on.

    Returns:
        Where they lie.

    Raises:
        OSError: They cannot be written.
    """
    path = store([rates], hardware)
    _find_rates.cache_clear()
    return path


def _estimates(name: str, index: int) -> list[DeviceRates]:
    """Of a GPU of a kind that the project did not measure."""
    if name.split()[0] != "cuda" or not torch.cuda.is_available():
        return []
    if any(rates.device == name for rates in RATES):
        return []
    facts = facts_of(index)
    return [] if facts is None else estimates(facts, plain=name.endswith(PLAIN))


def estimates(facts: DeviceFacts, *, plain: bool = False) -> list[DeviceRates]:
    """Rates of a GPU by what it is, from those of the measured one that is nearest to it.

    Args:
        facts: The GPU.
        plain: Whether plain PyTorch scores and selects on it.
    """
    name, measured = min(
        MEASURED.items(), key=lambda item: abs(item[1].capability[0] - facts.capability[0])
    )
    wanted = name + PLAIN if plain else name
    return [estimate(rates, measured, facts) for rates in RATES if rates.device == wanted]


def _distance(rates: DeviceRates, name: str, dtype: torch.dtype) -> tuple[bool, bool, bool, int]:
    other_kind = rates.device.split()[0] != name.split()[0]
    other_way = rates.device.endswith(PLAIN) != name.endswith(PLAIN)
    known = getattr(torch, rates.dtype)
    return other_kind, other_way, rates.device != name, abs(known.itemsize - dtype.itemsize)


@lru_cache
def device_name(kind: str, index: int | None = None) -> str:
    """The key of a device among the rates: ``"cpu"``, or ``"cuda"`` with its architecture."""
    if kind != "cuda" or not torch.cuda.is_available():
        return kind
    major, minor = torch.cuda.get_device_capability(index)
    return f"cuda sm{major}{minor}"


def hardware_name(kind: str, index: int = 0) -> str:
    """The product that a GPU is, or a CPU's vector units."""
    if kind == "cuda" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(index))
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}"
