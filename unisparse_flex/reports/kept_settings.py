"""Settings as calls have them: what changes one of them and keeps the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..block_masks.selectors import QUALITIES, Selector, selector_of_quality
from .attention_record import AttentionRecord
from .layers import excluded_layers, layer_index
from .wording import Wording

# The quality that is in force where none is named.
DEFAULT_QUALITY = "balanced"


def quality_of(selector: Selector) -> str | None:
    """The word of the dial that stands for a selector; ``None`` where none does."""
    return next((name for name in QUALITIES if selector_of_quality(name) == selector), None)


def setting(calls: Sequence[AttentionRecord], wording: Wording, name: str, value: Any) -> str:
    """What gives the calls a setting, beside those that they have."""
    return wording.setting(name, value, _other_settings(calls, name))


def _other_settings(calls: Sequence[AttentionRecord], name: str) -> dict[str, Any] | None:
    """The arguments of `optimize` that give what calls have beside one setting.

    ``None`` where no arguments are known that do: layers differ, as those of a calibration may, or
    a context of ranks is among the settings.
    """
    configs = [call.config for call in calls if call.config is not None and not call.config.dense]
    found: dict[str, set[Any]] = {
        "selector": {config.selector.text for config in configs},
        "min_length": {config.min_length for config in configs},
        "backend": {config.backend for config in configs},
    }
    # What it replaces does not matter.
    found.pop("selector" if name == "quality" else name, None)
    if any(len(values) > 1 for values in found.values()) or any(c.context for c in configs):
        return None
    kept = {each: value for each, values in found.items() for value in values}
    quality = quality_of(configs[0].selector) if configs else None
    if quality is not None and kept.pop("selector", None) is not None:
        kept |= {} if quality == DEFAULT_QUALITY else {"quality": quality}
    if kept.get("min_length") is None:
        kept.pop("min_length", None)
    if kept.get("backend") == "auto":
        del kept["backend"]
    layers = excluded_layers(calls)
    if layers != {layer_index(call) for call in calls if call.is_excluded}:
        return None
    return kept | ({"dense_layers": tuple(sorted(layers))} if layers else {})
