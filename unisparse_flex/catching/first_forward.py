"""A model that makes no attention call is told so once, by its first uncompiled forward."""

from __future__ import annotations

import logging
from weakref import WeakSet

from torch import nn

logger = logging.getLogger(__name__)

_waiting: WeakSet[nn.Module] = WeakSet()


def await_first_forward(model: nn.Module) -> None:
    """Has the next `check_first_forward` of a model that was optimized look at it."""
    _waiting.add(model)


def check_first_forward(model: object, *, seen: bool) -> None:
    """Warns of a model whose first forward is over and made no attention call.

    Args:
        model: Whose forward it was.
        seen: Whether it made a call that can be caught, sparse or not.
    """
    if not _waiting or model not in _waiting:
        return
    assert isinstance(model, nn.Module)
    _waiting.discard(model)
    if seen:
        return
    config = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    found = f" (attn_implementation={implementation!r})" if isinstance(implementation, str) else ""
    logger.warning(
        "nothing of %s%s is sparse: its forward called neither F.scaled_dot_product_attention nor "
        "nn.MultiheadAttention; of a Hugging Face model set attn_implementation='sdpa', in code of "
        "your own call one of them or unisparse_flex.attention",
        type(model).__name__,
        found,
    )
