"""`calibrate`: settings for each layer that reach a stated quality at the least predicted time."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..block_masks import DEFAULT_SELECTOR, Selector, UniSparse
from ..block_masks.selectors import default_top_p, validate_selector
from ..block_masks.validation import validate_fraction
from ..calibration import Calibration
from ..catching import hint_at_tensors, is_intercepted
from ..optimization import validate_model
from ..progress import Progress
from .outcome import say_left_dense, say_room_left, why_dense
from .search import Run, Search

logger = logging.getLogger(__name__)

# Shares of a row's estimated mass from which a block is kept, each with a mass that every row
# keeps at least.
THRESHOLDS = (
    *(0.064, 0.045, 0.032, 0.022, 0.016, 0.011, 0.008),
    *(0.0056, 0.004, 0.0028, 0.002, 0.0014, 0.001, 0.0005, 0.0002),
)
# Where heads have thresholds of their own, the mass is the same for all.
PER_HEAD_TOP_P = 0.8
# Of a result that no target asked for.
COARSEST = "the coarsest setting that is tried, which reaches more than was asked for"
# What a language model takes.
INPUTS = "have the tokenizer return tensors: tokenizer(text, return_tensors='pt')"


def default_ladder(*, per_head: bool = False) -> tuple[Selector, ...]:
    """`DEFAULT_SELECTOR` at other thresholds, from few blocks to many."""
    masses = [PER_HEAD_TOP_P if per_head else default_top_p(t) for t in THRESHOLDS]
    return tuple(
        replace(DEFAULT_SELECTOR, threshold=threshold, top_p=top_p)
        for threshold, top_p in zip(THRESHOLDS, masses, strict=True)
    )


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    kl: float | None = None,
    recall: float | None = None,
    ladder: Sequence[Selector] | None = None,
    min_length: int | None = None,
    per_head: bool = False,
    progress: bool = True,
) -> Calibration:
    """Finds a setting for each layer, or that it stays dense; call it once, before `optimize`.

    The dense model runs once over the batches. At each attention call every setting of the ladder
    selects blocks, and the share of dense attention's mass in them is computed exactly: about the
    cost of dense attention once more, in float32, head by head. One multiplier over all layers
    then trades mass for time where that is cheapest; for a KL also with the mass of each layer
    counted as much as the KL that is measured where only that layer, or a few neighbours, are
    sparse. A setting that is the same in all layers and reaches the target in less time is returned
    instead. Give one of the two targets; the same model, batches and machine give the same result.
    The model is left as it came.

    Args:
        model: As `optimize` takes it: not optimized, not compiled, in evaluation mode.
        batches: Inputs of the model, as long as those to come: each a tensor, a tuple of
            positional arguments or a mapping of keyword arguments. They are kept, and run up to
            33 times more for a KL.
        kl: Most KL(dense || sparse) of the next-token distributions, in nats, the mean over all
            positions; above 0. The model returns logits [..., V], or something with ``.logits``.
            Those of the dense model are kept meanwhile, for all batches.
        recall: Share of dense attention's mass to keep at least, in (0, 1]: of a layer the mean
            over the query rows and heads of all its calls, of the model the mean over its layers.
            A layer that stays dense counts as 1; one that keeps a narrow sliding window whole,
            whatever the setting, does not count.
        ladder: The settings to choose from; `DEFAULT_SELECTOR` at fifteen thresholds by
            default.
        min_length: As `optimize` will get it. By default time is what the cost model predicts for
            the density that was measured, and layers for which no setting is predicted to be
            faster stay dense; with a number, it is the blocks that are read, whatever the device.
        per_head: Gives each head a threshold of its own (``UniSparse.head_thresholds``); the ladder
            must then differ only in ``threshold``.
        progress: Writes what is being done to stderr, once it has taken two seconds.

    Returns:
        The settings of every module that made attention calls, each in its own name; `save` it,
        and give it or its path to `optimize` as ``selector``; a warning says why where all of them
        stay dense. The default cost model still decides there, call by call and without what was
        measured here; a warning says where it leaves layers dense at these lengths.

    Raises:
        TypeError: ``model`` is no module, or a batch or an output is none of the above.
        ValueError: Not exactly one target, a target out of range, no batch, an empty ladder, a
            model that is compiled, optimized or in training mode or that makes no attention call.
    """
    found = calibrate_or_say_why(
        model,
        batches,
        kl=kl,
        recall=recall,
        ladder=ladder,
        min_length=min_length,
        per_head=per_head,
        progress=progress,
    )
    if found.why_dense is not None:
        logger.warning("calibrate leaves every layer dense: %s", found.why_dense)
    if found.left_dense is not None:
        logger.warning("calibrate: %s", found.left_dense)
    if found.room_left is not None:
        logger.info("calibrate: %s", found.room_left)
    if found.is_coarsest:
        logger.info("calibrate found %s", COARSEST)
    return found.calibration


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """What was found, and what is to be said of it.

    Attributes:
        calibration: What `calibrate` returns.
        why_dense: Why that leaves every layer dense; ``None`` if it does not.
        left_dense: Which sparse layers `optimize` leaves dense at these lengths; ``None`` if it
            leaves none.
        room_left: Why more than half of the target is left, where layers are dense that gain
            nothing within it; ``None`` elsewhere.
        is_coarsest: Whether it is the coarsest setting that is tried, so that the target is reached
            with room to spare.
    """

    calibration: Calibration
    why_dense: str | None
    left_dense: str | None
    room_left: str | None
    is_coarsest: bool


def calibrate_or_say_why(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    kl: float | None,
    recall: float | None,
    ladder: Sequence[Selector] | None = None,
    min_length: int | None,
    per_head: bool,
    progress: bool,
) -> Calibrated:
    """What `calibrate` does, with what is to be said of it."""
    module = validate_model(model)
    if module is not model or any(m._compiled_call_impl is not None for m in model.modules()):
        way_out = "copy.deepcopy(model), which leaves out what model.compile() did"
        if module is not model:
            way_out = "the module that torch.compile was given"
        raise ValueError(
            f"model must not be compiled yet, got a compiled {type(module).__name__}; calibrate "
            f"{way_out}"
        )
    _validate_targets(recall, kl)
    settings = default_ladder(per_head=per_head) if ladder is None else tuple(ladder)
    _validate_ladder(settings, per_head=per_head)
    if model.training:
        raise ValueError(
            "model must be in evaluation mode, got training mode; call model.eval() first"
        )
    if any(is_intercepted(module) for module in model.modules()):
        raise ValueError(
            "model must not be optimized yet, got one that is; call restore(model) first"
        )
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(
            f"batches must be an iterable of inputs, got one {type(batches).__name__}; put it into "
            "a list"
        )
    runs = [_run(model, batch) for batch in batches]
    if not runs:
        raise ValueError("batches must hold at least one input of the model, got none")
    with Progress("calibrate", shown=progress) as display:
        search = Search(
            model, runs, settings, min_length=min_length, per_head=per_head, display=display
        )
        if recall is not None:
            found = search.reach_recall(recall)
        else:
            assert kl is not None
            found = search.reach_kl(kl)
        return Calibrated(
            calibration=found,
            why_dense=why_dense(search, found),
            left_dense=say_left_dense(search, found),
            room_left=say_room_left(search, found),
            is_coarsest=search.is_coarsest,
        )


def _validate_ladder(ladder: tuple[Selector, ...], *, per_head: bool) -> None:
    for selector in ladder:
        validate_selector(selector)
    sizes = sorted({selector.block_size for selector in ladder})
    if len(sizes) != 1:
        raise ValueError(
            "ladder must hold at least one selector, all of one block_size, got block sizes "
            f"{sizes}; leave it None for the default"
        )
    if per_head and not _differ_in_threshold(ladder):
        raise ValueError(
            "ladder must hold UniSparse selectors that differ only in threshold where per_head is "
            f"given, got {list(ladder)}; leave it None for the default"
        )


def _differ_in_threshold(ladder: tuple[Selector, ...]) -> bool:
    first = ladder[0]
    return isinstance(first, UniSparse) and all(
        isinstance(selector, UniSparse)
        and selector.threshold is not None
        and replace(selector, threshold=first.threshold) == first
        for selector in ladder
    )


def _validate_targets(recall: float | None, kl: float | None) -> None:
    if (recall is None) == (kl is None):
        raise ValueError(
            f"exactly one of recall and kl must be given, got recall={recall} and kl={kl}"
        )
    if recall is not None:
        validate_fraction(recall, "recall")
    if kl is not None:
        if not isinstance(kl, (int, float)) or isinstance(kl, bool):
            raise TypeError(f"kl must be a number, got {kl!r} of type {type(kl).__name__}")
        if not 0.0 < kl < math.inf:
            raise ValueError(f"kl must be above 0 and finite, got {kl}; 0 is the dense model")


def _run(model: nn.Module, batch: Any) -> Run:
    if isinstance(batch, Tensor):
        return partial(model, batch)
    if isinstance(batch, tuple):
        return partial(_call, model, batch, {})
    if isinstance(batch, Mapping):
        return partial(_call, model, (), batch)
    raise TypeError(
        "a batch must be a tensor, a tuple of positional arguments or a mapping of keyword "
        f"arguments, got {type(batch).__name__}; token ids are one Tensor"
    )


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    with hint_at_tensors(args, kwargs, INPUTS):
        return model(*args, **kwargs)
