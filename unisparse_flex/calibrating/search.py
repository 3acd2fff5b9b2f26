"""The search behind `calibrate`: what was measured of a model, and the settings that follow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..block_masks import Selector
from ..calibration import DENSE, Calibration, Setting
from ..calibration_fit import attention_sizes
from ..nearly_all import NEARLY_ALL
from ..optimization import optimize_layers, release_all
from ..passes import observe_calls
from ..progress import Progress
from ..reports import mean_density
from .allocation import Allocation, Frontier, Units, allocate, total_dropped
from .divergence import logits_of, sum_kl
from .layer_measure import LayerMeasure, measure_layers, with_head_thresholds

# Forward passes of the model that look for a KL: of one bisection, and of what layers do to it.
KL_PASSES, MOST_PROBES = 6, 12
# Of a layer's mass, what a setting drops by which the KL of the layer is measured.
PROBED_SHARE = 0.02
# The least that a layer's mass counts, as a share of the most: a measured KL may be 0.
LEAST_WEIGHT = 1e-3
# Sums of shares round: the target is met after rounding too.
ROUNDING = 1e-12

Run = Callable[[], Any]
# By layer, the setting of each of its units: an index into the ladder, or after its end.
Plan = dict[str, Allocation]


class Search:
    """Chooses a setting for every layer of a model; see `calibrate` for what they mean.

    Args:
        model: Not optimized.
        runs: Each runs the model on one batch.
        ladder: The settings, of one block size.
        min_length: As `optimize` takes it.
        per_head: Whether heads have thresholds of their own.
        display: Told of what is done.

    Attributes:
        is_coarsest: Whether the result is the coarsest that is tried: each layer at what costs
            least.
        nearly_all: The density of what was found and dropped, where that gains nothing.
        weights: By layer, the KL for the mass that it drops, where that was measured.
    """

    def __init__(
        self,
        model: nn.Module,
        runs: Sequence[Run],
        ladder: tuple[Selector, ...],
        *,
        min_length: int | None,
        per_head: bool,
        display: Progress,
    ) -> None:
        self.model, self.runs, self.ladder = model, runs, ladder
        self.min_length, self.per_head, self.display = min_length, per_head, display
        self.is_coarsest = False
        self.weights: dict[str, float] | None = None
        self.nearly_all: float | None = None
        self.dense_logits: list[Tensor] = []
        self.all_layers: dict[str, LayerMeasure] = {}
        self.layers: dict[str, LayerMeasure] = {}

    def reach_recall(self, recall: float) -> Calibration:
        """The least cost that keeps a share of the mass."""
        self._measure(lambda _: None)
        choosing = sum(layer.chooses for layer in self.layers.values())
        budget = max(0.0, (1.0 - recall) * choosing * (1.0 - ROUNDING))
        dense: set[str] = set()
        while True:
            free = [name for name in self.layers if name not in dense]
            plan = self._plan(free, allocate(self._units(free), budget) if free else ())
            slow = {name for name in free if self._is_slow(name, plan[name])}
            if not slow:
                uniform = next(
                    (p for p in self._uniform_plans() if self._recall(p) >= recall - ROUNDING), None
                )
                return self._result(plan, "recall", recall, self._recall(plan), uniform)
            # They drop nothing from now on: the rest may drop more.
            dense |= slow

    def reach_kl(self, kl: float) -> Calibration:
        """The cheapest of three bisections by passes of the model, each from few blocks to many.

        One is of the settings that are the same in all layers, one of the frontier, each step of
        which is a multiplier over all layers. What mass says of a layer is not all that the model
        makes of it: in the third, the mass of each layer counts as much as the KL that comes of
        it where that layer is sparse and the others are dense.

        Beside the dense run these take at most ``3 * (KL_PASSES + 1) + MOST_PROBES`` passes over
        all batches.
        """
        self._measure(lambda output: self.dense_logits.append(logits_of(output)))
        names = list(self.layers)
        plans = self._uniform_plans()
        uniform = self._bisect_kl(plans.__getitem__, len(plans), kl)
        frontier = Frontier(self._units(names))
        found = [
            uniform,
            self._bisect_kl(lambda step: self._plan(names, frontier[step]), len(frontier), kl),
        ]
        if not any(pair is not None and self._costs_least(pair[0]) for pair in found):
            found.append(self._reach_by_weight(kl))
        reaching = [pair for pair in found if pair is not None]
        if not reaching:
            return self._result(self._plan([], ()), "kl", kl, 0.0)
        # The first, one for all layers, where the others gain nothing.
        plan, reached = min(reaching, key=lambda pair: self._cost(pair[0]))
        return self._result(plan, "kl", kl, reached, None if uniform is None else uniform[0])

    def _reach_by_weight(self, kl: float) -> tuple[Plan, float] | None:
        """What reaches a KL on the frontier of mass that counts as `_weigh` says."""
        weights = self.weights = self._weigh()
        if weights is None:
            return None
        names = list(self.layers)
        units = self._units(names, weights)
        frontier = Frontier(units)
        return self._bisect_kl(
            lambda step: self._plan(names, frontier[step]),
            len(frontier),
            kl,
            [total_dropped(units, allocation) for allocation in frontier],
        )

    def _weigh(self) -> dict[str, float] | None:
        """KL for the mass that each layer drops, measured where few layers are sparse.

        Layers that follow one another share a pass where there are more than `MOST_PROBES`. The
        setting matters little: the KL grows about as the mass that one layer drops.

        Returns:
            By layer; ``None`` where layers cannot be told apart.
        """
        plan = {name: self._probe(name) for name in self.layers}
        dropped = {name: self.layers[name].share(choices) for name, choices in plan.items()}
        names = [n for n, share in dropped.items() if share > 0 and self.layers[n].could_be_faster]
        count = min(len(names), MOST_PROBES)
        if count < 2:
            return None
        weights: dict[str, float] = {}
        for i in range(count):
            some = names[i * len(names) // count : (i + 1) * len(names) // count]
            kl = self._measure_kl(self._plan([], ()) | {name: plan[name] for name in some})
            weights |= dict.fromkeys(some, kl / math.fsum(dropped[name] for name in some))
        most = max(weights.values()) or 1.0
        return {n: max(weights.get(n, most), LEAST_WEIGHT * most) for n in self.layers}

    def _probe(self, name: str) -> Allocation:
        """The finest setting of a layer that drops enough to be measured, else the coarsest."""
        layer = self.layers[name]
        settings = [(choice,) * layer.num_units for choice in range(len(self.ladder))]
        shares = [layer.share(choices) for choices in settings]
        enough = [share for share in shares if share >= PROBED_SHARE]
        return settings[shares.index(min(enough, default=max(shares)))]

    def _bisect_kl(
        self,
        plan_at: Callable[[int], Plan],
        count: int,
        kl: float,
        expected: Sequence[float] | None = None,
    ) -> tuple[Plan, float] | None:
        """The first of so many plans that reaches a KL, with its own, where the last one does.

        Args:
            plan_at: The plans, from few blocks to many.
            count: How many there are.
            kl: The target.
            expected: About the KL of each, none above that before it: then no halves are tried, but
                what is expected to reach the target by what was measured last.
        """
        too_sparse, enough = -1, count - 1
        found: tuple[Plan, float] | None = None
        scale = 1.0
        for _ in range(KL_PASSES):
            if enough - too_sparse <= 1:
                break
            step = (too_sparse + enough) // 2
            if expected is not None:
                first = next(i for i in range(count) if expected[i] * scale <= kl or i == enough)
                step = min(max(first, too_sparse + 1), enough - 1)
            plan = self._without_slow(plan_at(step))
            measured = self._measure_kl(plan)
            if measured <= kl:
                enough, found = step, (plan, measured)
            else:
                too_sparse = step
            if expected is not None and expected[step] > 0 and measured > 0:
                scale = measured / expected[step]
        if found is None:
            plan = self._without_slow(plan_at(enough))
            found = plan, self._measure_kl(plan)
        return found if found is not None and found[1] <= kl else None

    def _uniform_plans(self) -> list[Plan]:
        """Each setting of the ladder in all layers, from the cheapest to the dearest."""
        plans = [
            {name: (choice,) * layer.num_units for name, layer in self.layers.items()}
            for choice in range(len(self.ladder))
        ]
        return sorted(plans, key=self._cost)

    def _cost(self, plan: Plan) -> float:
        return math.fsum(
            layer.dense_cost if self._is_dense(plan[name]) else layer.chosen(layer.cost, plan[name])
            for name, layer in self.layers.items()
        )

    def _measure(self, keep: Callable[[Any], None]) -> None:
        """Fills the layers; ``keep`` gets every output of the dense model."""
        self.all_layers = measure_layers(
            self.model,
            self.runs,
            self.ladder,
            min_length=self.min_length,
            per_head=self.per_head,
            keep=keep,
            display=self.display,
        )
        if not self.all_layers:
            raise ValueError(
                f"model must make attention calls, got none from {type(self.model).__name__}; "
                "for Hugging Face models load with attn_implementation='sdpa'"
            )
        self.layers = {n: layer for n, layer in self.all_layers.items() if layer.could_be_sparse}

    def _units(self, names: Sequence[str], weights: Mapping[str, float] | None = None) -> Units:
        """The units of some layers; the mass that each drops counts as much as its weight says."""
        units = [(name, unit) for name in names for unit in self.layers[name].units()]
        if weights is None:
            return [unit for _, unit in units]
        return [
            [replace(choice, dropped=choice.dropped * weights[name]) for choice in unit]
            for name, unit in units
        ]

    def _plan(self, names: Sequence[str], allocation: Allocation) -> Plan:
        """What was allocated to the units of some layers; the others are dense."""
        dense = len(self.ladder)
        plan = {name: (dense,) * layer.num_units for name, layer in self.layers.items()}
        rest = iter(allocation)
        return plan | {name: tuple(itertools.islice(rest, len(plan[name]))) for name in names}

    def _is_dense(self, choices: Allocation) -> bool:
        return set(choices) == {len(self.ladder)}

    def _is_slow(self, name: str, choices: Allocation) -> bool:
        """Whether heads' settings that were chosen one by one take longer than dense attention."""
        layer = self.layers[name]
        return not self._is_dense(choices) and layer.chosen(layer.cost, choices) >= layer.dense_cost

    def _without_slow(self, plan: Plan) -> Plan:
        """The plan with its slow layers dense."""
        return self._plan([], ()) | {n: c for n, c in plan.items() if not self._is_slow(n, c)}

    def _costs_least(self, plan: Plan) -> bool:
        """Whether a plan is where both searches begin, with some layer sparse."""
        names = list(self.layers)
        if all(self._is_dense(choices) for choices in plan.values()):
            return False
        firsts = self._plan(names, Frontier(self._units(names))[0]), self._uniform_plans()[0]
        return any(plan == self._without_slow(first) for first in firsts)

    def _gains_nothing(self, plan: Plan) -> bool:
        """Whether what is sparse, all of it by choice, drops next to nothing of the model's."""
        sparse = [self.layers[name] for name, c in plan.items() if not self._is_dense(c)]
        all_choose = bool(sparse) and all(
            not is_window for layer in sparse for _, is_window in layer.densities
        )
        return all_choose and self._density(plan) >= NEARLY_ALL

    def _recall(self, plan: Plan) -> float:
        pairs = [(self.layers[name], choices) for name, choices in plan.items()]
        pairs = [pair for pair in pairs if pair[0].chooses]
        if not pairs:
            return 1.0
        shares = [layer.chosen(layer.dropped, choices) / layer.mass for layer, choices in pairs]
        return 1.0 - math.fsum(shares) / len(shares)

    def _settings(self, plan: Plan) -> dict[str, Setting]:
        chosen = {name: self._setting(choices) for name, choices in plan.items()}
        return {name: chosen.get(name, DENSE) for name in self.all_layers}

    def _setting(self, choices: Allocation) -> Setting:
        if self._is_dense(choices):
            return DENSE
        if not self.per_head:
            return self.ladder[choices[0]]
        # 0 keeps all blocks of a head.
        thresholds = (*(getattr(selector, "threshold", 0.0) for selector in self.ladder), 0.0)
        return with_head_thresholds(self.ladder[0], tuple(thresholds[c] for c in choices))

    @torch.no_grad()
    def _measure_kl(self, plan: Plan) -> float:
        settings = self._settings(plan)
        total, positions = 0.0, 0
        optimize_layers(self.model, settings, min_length=self.min_length or 0)
        try:
            # Watched calls run uncompiled: each setting would compile a kernel of its own.
            with (
                observe_calls(lambda *_: None, as_compiled=True),
                torch.compiler.set_stance("force_eager"),
            ):
                for i, (run, dense) in enumerate(zip(self.runs, self.dense_logits, strict=True)):
                    self.display.show(f"KL of a setting, batch {i + 1} of {len(self.runs)}")
                    total += sum_kl(dense, logits_of(run()))
                    positions += dense.shape[:-1].numel()
        finally:
            release_all(self.model)
        return max(0.0, total / positions)  # rounding goes below zero

    def _result(
        self,
        plan: Plan,
        quality: Literal["recall", "kl"],
        target: float,
        reached: float,
        uniform: Plan | None = None,
    ) -> Calibration:
        from .. import __version__

        if self._gains_nothing(plan):
            self.nearly_all = self._density(plan)
            plan, reached = self._plan([], ()), 1.0 if quality == "recall" else 0.0
        self.is_coarsest = self._costs_least(plan)
        return Calibration(
            layers=self._settings(plan),
            quality=quality,
            target=float(target),
            reached=reached,
            density=self._density(plan),
            uniform_density=None if uniform is None else self._density(uniform),
            model=type(self.model).__name__,
            unisparse_flex=__version__,
            torch=str(torch.__version__),
            sizes=attention_sizes(self.model, self.all_layers),
            lengths=sorted({s.kv_len for layer in self.layers.values() for s in layer.shapes}),
        )

    def _density(self, plan: Plan) -> float:
        pairs = [(self.layers[name], choices) for name, choices in plan.items()]
        density = mean_density(
            (layer.chosen(densities, choices), is_window)
            for layer, choices in pairs
            for densities, is_window in layer.densities
        )
        return 1.0 if density is None else density
