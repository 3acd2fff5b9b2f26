"""Rates that a user measured on their own device, kept between processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ...block_masks.installation import cache_folder, installed_version
from .device_rates import DeviceRates, read_rates

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "triton", "unisparse-flex")
SOURCE = "measured here: unisparse-flex doctor --measure"


def stored_path(device: str) -> Path:
    """Where the rates of a device are kept, by its key among rates."""
    return cache_folder() / "rates" / f"{device.replace(' ', '-')}.json"


def store(rates: Sequence[DeviceRates], hardware: str) -> Path:
    """Keeps the rates of one device in several dtypes, for this hardware and these versions.

    Raises:
        OSError: They cannot be written.
    """
    device = rates[0].device
    labels = ("device", "dtype", "source")
    content = {
        "device": device,
        "source": SOURCE,
        "hardware": hardware,
        "versions": _versions(),
        "rates": {
            one.dtype: {
                name: getattr(one, name) for name in one.__dataclass_fields__ if name not in labels
            }
            for one in rates
        },
    }
    path = stored_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    load_stored.cache_clear()
    return path


@lru_cache(maxsize=64)
def load_stored(device: str, hardware: str) -> tuple[DeviceRates, ...]:
    """The rates that were kept; none of other hardware or versions, or of a file that is broken."""
    try:
        text = stored_path(device).read_text()
        written = json.loads(text)
        if (written["hardware"], written["versions"]) != (hardware, _versions()):
            return ()
        return tuple(rates for rates in read_rates(text) if rates.device == device)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.debug("rates in %s are not read: %r", stored_path(device), error)
        return ()


def _versions() -> dict[str, str | None]:
    return {name: installed_version(name) for name in PACKAGES}
