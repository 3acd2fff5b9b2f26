"""A model that makes no attention call is told so once, by its first uncompiled forward."""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

from torch import nn
from torch._dynamo.utils import counters

logger = logging.getLogger(__name__)

# Models, each with how much had been compiled when it was optimized.
_waiting: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def await_first_forward(model: nn.Module) -> None:
    """Has the next `check_first_forward` of a model that was optimized look at it."""
    _waiting[model] = _compiled_frames()


def check_first_forward(model: object, *, seen: bool) -> None:
    """Warns of a model whose first forward is over and made no attention call.

    Args:
        model: Whose forward it was.
        seen: Whether it made a call that can be caught, sparse or not.
    """
    if not _waiting or not isinstance(model, nn.Module):
        return
    before = _waiting.pop(model, None)
    # What compiled parts of a model call is not seen here.
    if before is None or seen or _compiled_frames() != before:
        return
    config = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    found = f" (attn_implementation={implementation!r})" if isinstance(implementation, str) else ""
    logger.warning(
        "nothing of %s%s is sparse: its forward called neither\n"
        "  F.scaled_dot_product_attention nor nn.MultiheadAttention; of a Hugging Face\n"
        "  model set attn_implementation='sdpa', in code of your own call one of them or\n"
        "  unisparse_flex.attention",
        type(model).__name__,
        found,
    )


def _compiled_frames() -> int:
    return counters["frames"]["total"]
