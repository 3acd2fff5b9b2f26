"""`calibrate`: the settings of each layer that reach a stated quality at the least predicted time.

Symbols: B batch, Hq heads, Nq/Nk blocks, P positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .allocation import Allocation, allocate, frontier, mean_dropped
from .block_masks import Selector, UniSparse
from .block_masks.validation import validate_fraction
from .calibration import DENSE, Calibration, Setting
from .interception import is_intercepted
from .layer_measure import LayerMeasure, measure_layers
from .optimize import optimize_layers, restore, validate_model
from .passes import observe_calls, validate_selector
from .step_display import StepDisplay

# Shares of a row's estimated mass from which a block is kept, each with a mass that every row
# keeps at least.
THRESHOLDS = (0.032, 0.022, 0.016, 0.011, 0.008, 0.0056, 0.004, 0.0028, 0.002, 0.0014, 0.001)
MASS_FACTOR = 12
# Forward passes of the model that look for a KL.
KL_PASSES = 6
# Rows of [P, V] per step: keeps the temporaries of the KL small.
ROWS_PER_STEP = 128

Run = Callable[[], Any]


def default_ladder() -> tuple[Selector, ...]:
    """UniSparse at two granularities, from few blocks to many."""
    return tuple(
        UniSparse(
            c_q=16,
            c_k=16,
            sampled_queries=4,
            threshold=threshold,
            top_p=round(1.0 - MASS_FACTOR * threshold, 4),
        )
        for threshold in THRESHOLDS
    )


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    recall: float | None = None,
    kl: float | None = None,
    ladder: Sequence[Selector] | None = None,
    min_length: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Finds a setting for each layer, or that it stays dense; call it once, before `optimize`.

    The dense model runs once over the batches. At each attention call every setting of the ladder
    selects blocks, and the share of dense attention's mass in them is computed exactly: about the
    cost of dense attention once more, in float32, head by head. One multiplier over all layers
    then trades mass for time where that is cheapest. Give one of the two targets; the same model,
    batches and machine give the same result. The model is left as it came.

    Args:
        model: As `optimize` takes it: not optimized, not compiled, in evaluation mode.
        batches: Inputs of the model, as long as those to come: each a tensor, a tuple of
            positional arguments or a mapping of keyword arguments. They are kept, and run up to
            seven times more for a KL.
        recall: Share of dense attention's mass to keep at least, in (0, 1]: of a layer the mean
            over the query rows and heads of all its calls, of the model the mean over its layers.
            A layer that stays dense counts as 1.
        kl: Most KL(dense || sparse) of the next-token distributions, in nats, the mean over all
            positions; above 0. The model returns logits [..., V], or something with ``.logits``.
            Those of the dense model are kept meanwhile, for all batches.
        ladder: The settings to choose from; `UniSparse` at eleven thresholds by default.
        min_length: As `optimize` will get it. By default time is what the cost model predicts for
            the density that was measured, and layers for which no setting is predicted to be
            faster stay dense; with a number, it is the blocks that are read, whatever the device.
        progress: Writes what is being done to stderr, once it has taken two seconds.

    Returns:
        The settings of every module that made attention calls, each in its own name; `save` it,
        and give it or its path to `optimize` as ``selector``. The default cost model still
        decides there, call by call and without what was measured here.

    Raises:
        TypeError: ``model`` is no module, or a batch or an output is none of the above.
        ValueError: Not exactly one target, a target out of range, no batch, an empty ladder, a
            model that is compiled, optimized or in training mode or that makes no attention call.
    """
    validate_model(model)
    _validate_targets(recall, kl)
    settings = default_ladder() if ladder is None else tuple(ladder)
    _validate_ladder(settings)
    if model.training:
        raise ValueError(
            "model must be in evaluation mode, got training mode; call model.eval() first"
        )
    if any(is_intercepted(module) for module in model.modules()):
        raise ValueError(
            "model must not be optimized yet, got one that is; call restore(model) first"
        )
    runs = [_run(model, batch) for batch in batches]
    if not runs:
        raise ValueError("batches must hold at least one input of the model, got none")
    with StepDisplay("calibrate", shown=progress) as display:
        search = _Search(model, runs, settings, min_length, display)
        if recall is not None:
            return search.reach_recall(recall)
        assert kl is not None
        return search.reach_kl(kl)


class _Search:
    """What was measured of a model, and the allocations that follow from it."""

    def __init__(
        self,
        model: nn.Module,
        runs: Sequence[Run],
        ladder: tuple[Selector, ...],
        min_length: int | None,
        display: StepDisplay,
    ) -> None:
        self.model, self.runs, self.ladder = model, runs, ladder
        self.min_length, self.display = min_length, display
        self.dense_logits: list[Tensor] = []

    def reach_recall(self, recall: float) -> Calibration:
        layers = self._measure(lambda _: None)
        choices = [layer.choices() for layer in layers.values()]
        if not choices:
            return self._result((), "recall", recall, 1.0)
        allocation = allocate(choices, 1.0 - recall)
        return self._result(allocation, "recall", recall, 1.0 - mean_dropped(choices, allocation))

    def reach_kl(self, kl: float) -> Calibration:
        """Bisects the frontier: each step along it is a multiplier."""
        layers = self._measure(lambda output: self.dense_logits.append(_logits(output)))
        choices = [layer.choices() for layer in layers.values()]
        if not choices:
            return self._result((), "kl", kl, 0.0)
        found = frontier(choices)
        too_sparse, enough, reached = -1, len(found) - 1, None
        for _ in range(KL_PASSES):
            if enough - too_sparse <= 1:
                break
            middle = (too_sparse + enough) // 2
            measured = self._measure_kl(found[middle])
            if measured <= kl:
                enough, reached = middle, measured
            else:
                too_sparse = middle
        if reached is None:
            reached = self._measure_kl(found[enough])
        if reached > kl:
            dense = len(self.ladder)
            return self._result((dense,) * len(choices), "kl", kl, 0.0)
        return self._result(found[enough], "kl", kl, reached)

    def _measure(self, keep: Callable[[Any], None]) -> dict[str, LayerMeasure]:
        """The layers that could be sparse; ``keep`` gets every output of the dense model."""
        self.names = measure_layers(
            self.model,
            self.runs,
            self.ladder,
            min_length=self.min_length,
            keep=keep,
            display=self.display,
        )
        if not self.names:
            raise ValueError(
                f"model must make attention calls, got none from {type(self.model).__name__}; "
                "for Hugging Face models load with attn_implementation='sdpa'"
            )
        self.layers = {n: layer for n, layer in self.names.items() if layer.could_be_sparse}
        return self.layers

    def _settings(self, allocation: Allocation) -> dict[str, Setting]:
        options: tuple[Setting, ...] = (*self.ladder, DENSE)
        chosen = {n: options[i] for n, i in zip(self.layers, allocation, strict=True)}
        return {name: chosen.get(name, DENSE) for name in self.names}

    @torch.no_grad()
    def _measure_kl(self, allocation: Allocation) -> float:
        settings = self._settings(allocation)
        total, positions = 0.0, 0
        optimize_layers(self.model, settings, min_length=self.min_length or 0)
        try:
            # Watched calls run uncompiled: each setting would compile a kernel of its own.
            with observe_calls(lambda *_: None), torch.compiler.set_stance("force_eager"):
                for i, (run, dense) in enumerate(zip(self.runs, self.dense_logits, strict=True)):
                    self.display.show(f"KL of a setting, batch {i + 1} of {len(self.runs)}")
                    total += _sum_kl(dense, _logits(run()))
                    positions += dense.shape[:-1].numel()
        finally:
            restore(self.model)
        return max(0.0, total / positions)  # rounding goes below zero

    def _result(
        self,
        allocation: Allocation,
        quality: Literal["recall", "kl"],
        target: float,
        reached: float,
    ) -> Calibration:
        from . import __version__

        pairs = list(zip(self.layers.values(), allocation, strict=True))
        visible = math.fsum(layer.visible for layer in self.layers.values())
        kept = math.fsum(layer.kept[choice] for layer, choice in pairs)
        return Calibration(
            layers=self._settings(allocation),
            quality=quality,
            target=float(target),
            reached=reached,
            density=kept / visible if visible else 1.0,
            model=type(self.model).__name__,
            unisparse_flex=__version__,
            torch=str(torch.__version__),
        )


def _validate_ladder(ladder: tuple[Selector, ...]) -> None:
    for selector in ladder:
        validate_selector(selector)
    sizes = sorted({selector.block_size for selector in ladder})
    if len(sizes) != 1:
        raise ValueError(
            "ladder must hold at least one selector, all of one block_size, got block sizes "
            f"{sizes}; leave it None for the default"
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
        return lambda: model(batch)
    if isinstance(batch, tuple):
        return lambda: model(*batch)
    if isinstance(batch, Mapping):
        return lambda: model(**batch)
    raise TypeError(
        "a batch must be a tensor, a tuple of positional arguments or a mapping of keyword "
        f"arguments, got {type(batch).__name__}"
    )


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 2:
        raise TypeError(
            "for a kl the model must return logits [..., vocabulary] or something with .logits, "
            f"got {type(output).__name__}; give recall instead"
        )
    return logits


def _sum_kl(dense: Tensor, other: Tensor) -> float:
    """KL(dense || other) in nats, summed over positions; both logits [..., V]."""
    total = 0.0
    pairs = zip(*(t.flatten(0, -2).split(ROWS_PER_STEP) for t in (dense, other)), strict=True)
    for rows in pairs:
        p, q = (chunk.float().log_softmax(-1) for chunk in rows)
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return total
