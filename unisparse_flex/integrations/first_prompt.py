"""A model of a registered name none of whose attention is sparse is told so by its first prompt."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from ..catching import is_seen_here, name_reason
from ..passes import DenseReason
from ..passes.attend import Outcomes, count_outcomes

logger = logging.getLogger(__name__)

OutputT = TypeVar("OutputT")

# Settings with which a call was sparse, or of which somebody was told.
_settled: set[str] = set()
# Of others what became of the calls of this forward, and whether it was told of a short prompt.
_outcomes: dict[str, Outcomes] = {}
_told_short: set[str] = set()


def is_first_forward(settings: str) -> bool:
    """Whether nothing is known yet of eager calls with these settings, and nobody else looks."""
    return not torch.compiler.is_compiling() and settings not in _settled and not is_seen_here()


def settle(settings: str) -> None:
    """Says that a call with these settings was sparse."""
    _settled.add(settings)


def attend_first(settings: str, module: nn.Module, attend: Callable[[], OutputT]) -> OutputT:
    """Calls ``attend``, and warns after the last layer where no call was sparse.

    Once for the same settings, whatever models have them; layers that do not say which they are
    say nothing.

    Args:
        settings: Of the layers that may be sparse, encoded.
        module: Whose attention it is.
        attend: Computes it.
    """
    with count_outcomes() as found:
        output = attend()
    outcomes = _outcomes.setdefault(settings, Outcomes())
    # What has few queries goes to SDPA without being caught.
    outcomes.update(found or {DenseReason.FEW_QUERIES: 1})
    if outcomes[None]:
        settle(settings)
    elif _is_last(module):
        _tell(settings, module, outcomes)
    else:
        return output
    _outcomes.pop(settings, None)
    return output


def _tell(settings: str, module: nn.Module, outcomes: Outcomes) -> None:
    # Of what is excluded somebody knows already.
    reasons = set(outcomes) - {DenseReason.EXCLUDED, None}
    if reasons == {DenseReason.FEW_QUERIES}:
        if settings in _told_short:
            return
        _told_short.add(settings)
    else:
        _settled.add(settings)
    if reasons:
        name = type(module.config).__name__.removesuffix("Config")
        logger.warning(name_reason(f"a {name} model", outcomes))


def _is_last(module: nn.Module) -> bool:
    index: Any = getattr(module, "layer_idx", None)
    count: Any = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    return index is not None and count is not None and index == count - 1
