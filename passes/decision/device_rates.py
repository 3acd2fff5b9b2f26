"""How fast a device works, as `python -m bench.cost_rates` measures it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from importlib import resources

PLAIN = " plain"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRates:
    """Rates of one kind of device in one dtype; each is a symbol of `cost_model.attention_stages`.

    Those of the CPU are for one thread. 0 stands for a rate that was not measured, or of which
    nothing depends.

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
        masked_flop_rate: FLOP/s of dense attention under a mask tensor.
        masked_exp_rate: Exponentials a second of dense attention under a mask tensor.
        dense_host_seconds: Seconds that Python takes to launch a dense call, where the device
            does not wait for it.
        sparse_host_seconds: The same of a sparse call.
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
    masked_flop_rate: float = 0.0
    masked_exp_rate: float = 0.0
    dense_host_seconds: float = 0.0
    sparse_host_seconds: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether plain PyTorch selects."""
        return self.device == "cpu" or self.device.endswith(PLAIN)

    def on_threads(self, threads: int) -> DeviceRates:
        """The same device with its work spread evenly over ``threads``."""
        if threads == 1:
            return self
        faster = {name: getattr(self, name) * threads for name in RATE_NAMES if is_speed(name)}
        return replace(self, block_seconds=self.block_seconds / threads, **faster)

    def values(self) -> dict[str, float]:
        """The rates by name, as the cost model divides by them: no work over 0 takes no time."""
        found = {name: getattr(self, name) for name in RATE_NAMES}
        return {
            name: math.inf if is_speed(name) and not value else value
            for name, value in found.items()
        }


RATE_NAMES = tuple(f.name for f in fields(DeviceRates) if f.type == "float")


def is_speed(name: str) -> bool:
    """Whether a rate is work a second; others are seconds."""
    return name.endswith("rate") or name == "bandwidth"


def read_rates(text: str) -> list[DeviceRates]:
    """The rates in a file that ``python -m bench.cost_rates`` wrote.

    Raises:
        ValueError: The text is no such file.
    """
    try:
        written = json.loads(text)
        labels = {"device": written["device"], "source": written["source"]}
        return [
            DeviceRates(dtype=dtype, **labels, **rates) for dtype, rates in written["rates"].items()
        ]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"a file of rates must be JSON with device, source and rates of each dtype: {error!r}"
        ) from error


def _read_shipped() -> tuple[DeviceRates, ...]:
    folder = resources.files(__package__).joinpath("rates")
    written = sorted(file.name for file in folder.iterdir() if file.name.endswith(".json"))
    return tuple(
        rates for name in written for rates in read_rates(folder.joinpath(name).read_text())
    )


# Those that the project measured.
RATES = _read_shipped()
