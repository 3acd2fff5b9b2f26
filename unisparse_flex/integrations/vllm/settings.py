"""The settings of an engine, from its configuration."""

from __future__ import annotations

from typing import Any

from .options import KEY, Options


def options_of(config: Any) -> Options:
    """What a ``VllmConfig`` says in ``additional_config["unisparse"]``; defaults for nothing.

    Raises:
        TypeError: See `Options.read`.
        ValueError: See `Options.read`.
        OSError: See `Options.read`.
    """
    given = config.additional_config
    given = given.get(KEY) if isinstance(given, dict) else None
    return Options() if given is None else Options.read(given)
