"""Settings that were saved with MODEL: they count where no option says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..integrations.transformers_config import (
    ATTRIBUTE,
    AttentionSettings,
    read_settings,
    saved_values,
    stated,
)
from ..selectors import Selector
from .arguments import is_given
from .failures import wrong_content
from .models import check_backend, check_layers, stated_settings

if TYPE_CHECKING:
    from ..calibration import Calibration

# What a saved selector is called that is no quality.
SAVED = "saved"
# What an option says instead of what is saved.
OPTIONS = {
    "quality": ("selector", "quality"),
    "selector": ("selector", "quality"),
    "min_length": ("min_length",),
    "dense_layers": ("dense_layers",),
    "backend": ("backend",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of a command: its options, and what was saved where none was given.

    Attributes:
        selector: The saved one; ``None`` where an option or a default says which.
        name: What that is called.
        min_length: See `optimize`.
        dense_layers: See `optimize`.
        backend: See `optimize`.
        source: Where they come from, in words; ``None`` where nothing was saved.
    """

    selector: Selector | None
    name: str
    min_length: int | None
    dense_layers: tuple[int, ...]
    backend: str
    source: str | None

    def dial(self, asked: dict[str, Selector | Calibration]) -> dict[str, Selector | Calibration]:
        """The saved selector by its name, else those that are asked for."""
        return asked if self.selector is None else {self.name: self.selector}

    @property
    def sparsity(self) -> dict[str, Any]:
        """What `Sparsity` takes."""
        return {
            "min_length": self.min_length,
            "dense_layers": self.dense_layers,
            "backend": self.backend,
        }


def check_saved(name: str, *, device: str | None) -> None:
    """Raises where the settings saved in MODEL's folder cannot be used, before it is loaded.

    Raises:
        click.UsageError: As `merge_saved`; or the model has no such layer.
    """
    values = stated_settings(name)
    if values is None or values == {}:
        return
    settings, used = _read(values), _used(values)
    if "backend" in used:
        check_backend(settings.backend, device)
    if "dense_layers" in used:
        check_layers(name, settings.dense_layers, of=f"{ATTRIBUTE}.dense_layers in config.json")


def merge_saved(
    model: Any,
    *,
    device: str | None,
    min_length: int | None,
    dense_layers: tuple[int, ...],
    backend: str,
) -> Settings:
    """Settings of the command that runs, given or saved with the model that it loaded.

    Args:
        model: Of transformers.
        device: Of ``--device``.
        min_length: Of the options, as are the others.
        dense_layers: See ``min_length``.
        backend: See ``min_length``.

    Raises:
        click.UsageError: What was saved is not what `configure` writes, or the device has no such
            kernel.
    """
    values = saved_values(model)
    options: Any = {"min_length": min_length, "dense_layers": dense_layers, "backend": backend}
    if values is None or values == {}:
        return Settings(selector=None, name="", source=None, **options)
    saved = _read(values)
    values = stated(values)
    given = {key: _options_given(key) for key in values}
    used = _used(values)
    options |= {key: getattr(saved, key) for key in used if key in options}
    if "backend" in used:
        check_backend(saved.backend, device)
    selects = "quality" in used or "selector" in used
    return Settings(
        selector=saved.selector if selects else None,
        name=str(used.get("quality", SAVED)) if selects else "",
        source=_say_source(used, {key: value for key, value in given.items() if value}, values),
        **options,
    )


def say_saved(model: Any) -> str:
    """What was saved with a model, in words; empty where nothing was."""
    values = saved_values(model)
    return f"{_say(values)} in config.json" if isinstance(values, dict) and values else ""


def _read(values: Any) -> AttentionSettings:
    with wrong_content("read the settings saved with the model"):
        return read_settings(values)


def _used(values: Mapping[str, Any]) -> dict[str, Any]:
    """What no option replaces."""
    return {key: value for key, value in stated(values).items() if not _options_given(key)}


def _options_given(key: str) -> list[str]:
    """The options on the command line that say something else than a saved key."""
    return [f"--{name.replace('_', '-')}" for name in OPTIONS.get(key, ()) if is_given(name)]


def _say_source(
    used: Mapping[str, Any], given: Mapping[str, list[str]], values: Mapping[str, Any]
) -> str:
    parts = [f"config.json ({_say(used)})"] if used else []
    if given:
        options = ", ".join(dict.fromkeys(name for names in given.values() for name in names))
        left = {key: values[key] for key in given}
        parts.append(f"{options} in place of {_say(left)} in config.json")
    return "; ".join(parts)


def _say(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in values.items())
