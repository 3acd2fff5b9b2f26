"""Layers of a model by the names and places of their attention calls."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .attention_record import AttentionRecord
from .wording import name_runs, runs_of


def excluded_layers(calls: Sequence[AttentionRecord]) -> set[int]:
    """Indices of which every call is excluded already."""
    found = {layer_index(call) for call in calls if call.is_excluded}
    others = {layer_index(call) for call in calls if not call.is_excluded}
    return {index for index in found - others if index is not None}


def layer_index(call: AttentionRecord) -> int | None:
    """The place of the call's layer in its stack, which is what ``dense_layers`` counts."""
    return index_of(call.layer)


def index_of(name: str) -> int | None:
    """The place in its stack of a layer of this name; ``None`` where the name says none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None


def name_layers(indices: Sequence[int]) -> str:
    """Layers in words, such as ``"layers 0-2, 5"``."""
    return f"layer{'' if len(indices) == 1 else 's'} {name_runs(runs_of(indices), ', ')}"
