"""A model none of whose attention is sparse is told so once, by its first uncompiled forward."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn
from torch._dynamo.utils import counters

from ..passes import DenseReason
from ..passes.attend import Outcomes, are_counted, count_outcomes, is_watched
from ..passes.decision import say_reasons
from ..wrapping import wrap

logger = logging.getLogger(__name__)

COLUMNS = 80
EXPLAIN = "print(unisparse_flex.explain(model, inputs))"

# Models that were optimized, each with whether it was told that its prompt was short.
_waiting: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def await_first_forward(model: nn.Module) -> None:
    """Has the next `first_forward` of a model that was optimized look at it."""
    _waiting[model] = False


def is_awaited(model: nn.Module) -> bool:
    """Whether this forward of a model is the first, and nobody else looks at its calls."""
    return bool(_waiting) and model in _waiting and not (are_counted() or is_watched())


@contextmanager
def first_forward(model: nn.Module) -> Iterator[None]:
    """Warns after the block, in which the forward runs, if it made no sparse call, and why.

    Of calls of few queries, as in decoding, a model is told too, and waits on for a longer prompt.
    """
    before = _compiled_frames()
    with count_outcomes() as outcomes:
        yield
    was_told = _waiting.pop(model, True)
    # What compiled parts of a model call is not seen here.
    if _compiled_frames() != before or outcomes[None]:
        return
    if not outcomes:
        logger.warning(_name_no_call(model))
        return
    # Of what is excluded somebody knows already.
    reasons = set(outcomes) - {DenseReason.EXCLUDED}
    is_short = reasons == {DenseReason.FEW_QUERIES}
    if is_short:
        _waiting[model] = True
    if reasons and not (is_short and was_told):
        logger.warning(name_reason(type(model).__name__, outcomes))


def _name_no_call(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    found = f" (attn_implementation={implementation!r})" if isinstance(implementation, str) else ""
    return (
        f"nothing of {type(model).__name__}{found} is sparse: its forward called neither\n"
        "  F.scaled_dot_product_attention nor nn.MultiheadAttention; of a Hugging Face\n"
        "  model set attn_implementation='sdpa', in code of your own call one of them or\n"
        "  unisparse_flex.attention"
    )


def name_reason(model: str, outcomes: Outcomes) -> str:
    """What a model is told none of whose calls was sparse."""
    total = outcomes.total()
    calls = f"all {total} calls" if total > 1 else "the only call"
    return wrap(
        f"nothing of {model} is sparse: {calls} of its attention stayed dense"
        f"{say_reasons(outcomes)}; {EXPLAIN} says what to do",
        COLUMNS,
        [EXPLAIN],
    )


def _compiled_frames() -> int:
    return counters["frames"]["total"]
