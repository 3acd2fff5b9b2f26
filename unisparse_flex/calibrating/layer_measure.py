"""What every setting of a ladder keeps of each layer's attention, on a dense model's own tensors.

Symbols: B batch, Hq heads, Nq/Nk blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..block_masks import Selector, UniSparse
from ..optimization import layer_modules, optimize_layers, release_all
from ..passes import DenseReason, SparseConfig, observe_calls
from ..passes.attend import apply_autocast, call_geometry, keeps_window, read_call, select
from ..passes.calls import SdpaCall
from ..passes.decision import CallShape, call_shape, flex_lowers, forecast, refuse
from ..progress import Progress
from ..reports import track_layer
from .allocation import Choice
from .block_mass import compute_block_mass


class LayerMeasure:
    """Sums over the calls of one layer that could be sparse, in float64.

    Attributes:
        mass: Attention mass: 1 for each query row and head.
        visible: Blocks that dense attention reads.
        dense_cost: Of dense attention: predicted seconds, or blocks.
        dropped: [settings + 1, units], mass that each setting drops; the last row drops nothing.
        kept: [settings + 1, units], blocks that each setting reads.
        cost: [settings + 1, units], predicted seconds of each setting, or the blocks.
        densities: Of each call: [settings + 1, units], the blocks that each setting reads over
            those that dense attention does, and whether it keeps all of a narrow window.
        refused: Of calls that could not be sparse with any setting, how many for each reason.
        shapes: Of calls that could.

    Args:
        settings: How many there are in the ladder.
        per_head: Whether each head is a unit, the last row then keeping all of its blocks;
            otherwise the layer is one, and the last row is dense attention.
    """

    def __init__(self, settings: int, *, per_head: bool) -> None:
        self.per_head = per_head
        self.mass = self.visible = self.dense_cost = 0.0
        self.dropped = self.kept = self.cost = torch.zeros((settings + 1, 1), dtype=torch.float64)
        self.densities: list[tuple[Tensor, bool]] = []
        self.refused: Counter[DenseReason] = Counter()
        self.shapes: set[CallShape] = set()

    @property
    def could_be_sparse(self) -> bool:
        """Whether some call could, with some setting."""
        return self.visible > 0

    @property
    def chooses(self) -> bool:
        """Whether settings matter to some call: not where all keep a narrow window whole."""
        return not all(is_window for _, is_window in self.densities)

    @property
    def could_be_faster(self) -> bool:
        """Whether some setting of some unit costs less than its share of dense attention."""
        return bool((self.cost[:-1] * self.num_units < self.dense_cost).any())

    @property
    def num_units(self) -> int:
        """Heads, or 1."""
        return self.dropped.shape[1]

    def chosen(self, sums: Tensor, choices: Sequence[int]) -> float:
        """The entries of `dropped`, `kept` or `cost` for a setting of each unit, added up."""
        return float(sums[list(choices), range(self.num_units)].sum())

    def share(self, choices: Sequence[int]) -> float:
        """Mass that is dropped with a setting of each unit, as a share of the layer's."""
        return self.chosen(self.dropped, choices) / (self.mass or 1.0)

    def units(self) -> list[list[Choice]]:
        """The settings of each unit, as they are chosen from; mass as a share of the layer's."""
        shares = self.dropped / (self.mass or 1.0)
        return [
            [Choice(cost=cost, dropped=dropped) for cost, dropped in zip(*columns, strict=True)]
            for columns in zip(self.cost.T.tolist(), shares.T.tolist(), strict=True)
        ]

    def add(self, call: SdpaCall, ladder: Sequence[Selector], min_length: int | None) -> None:
        """Adds a call of real tensors, if it could be sparse, as a compiled model makes it.

        Args:
            call: The call.
            ladder: The settings, of one block size.
            min_length: As `optimize` takes it.

        Raises:
            ValueError: Heads are units, and there are others than in earlier calls.
        """
        free = SparseConfig.of_model(ladder[0], min_length=0)
        call, _ = read_call(call, free, everywhere=True) or (call, [])
        reasons = [refuse_call(call, selector, min_length) for selector in ladder]
        usable = [reason is None for reason in reasons]
        if not any(usable):
            self.refused.update(reason for reason in reasons[:1] if reason is not None)
            return
        # As `optimize` sees it, where it decides.
        self.shapes.add(call_shape(call))
        call = apply_autocast(call)
        first = SparseConfig(selector=ladder[usable.index(True)])
        geometry = call_geometry(call, first)
        mass = compute_block_mass(call, geometry)
        visible = self._per_unit(select(call, first).visible.expand(mass.shape))
        if self.could_be_sparse and self.num_units != len(visible):
            raise ValueError(
                "per_head needs as many heads in every call of a module, got "
                f"{self.num_units} and {len(visible)}; calibrate without per_head"
            )
        all_cost, dense_cost = self._costs(call, first.selector, visible, visible, min_length)
        everything = (
            torch.zeros_like(visible),
            visible,
            all_cost if self.per_head else all_cost.new_full((1,), dense_cost),
        )
        rows = []
        for selector, is_usable in zip(ladder, usable, strict=True):
            if not is_usable:
                rows.append(everything)
                continue
            keep = select(call, SparseConfig(selector=selector)).keep.expand(mass.shape)
            kept = self._per_unit(keep)
            cost, _ = self._costs(call, selector, kept, visible, min_length)
            rows.append((self._per_unit(mass.masked_fill(keep, 0.0)), kept, cost))
        dropped, kept, cost = (
            torch.stack(column) for column in zip(*rows, everything, strict=True)
        )
        self.densities.append((kept / visible.sum(), keeps_window(geometry)))
        self.dropped, self.kept = self.dropped + dropped, self.kept + kept
        self.cost = self.cost + cost
        self.mass += float(mass.sum(dtype=torch.float64))
        self.visible += float(visible.sum())
        self.dense_cost += dense_cost

    def _per_unit(self, blocks: Tensor) -> Tensor:
        """Sums [B, Hq, Nq, Nk] over all but units: float64 [units] on the CPU."""
        sums = blocks.sum((0, 2, 3), dtype=torch.float64).cpu()
        return sums if self.per_head else sums.sum(0, keepdim=True)

    def _costs(
        self,
        call: SdpaCall,
        selector: Selector,
        kept: Tensor,
        visible: Tensor,
        min_length: int | None,
    ) -> tuple[Tensor, float]:
        """Cost of sparse attention by unit, and of dense attention: seconds, or blocks read."""
        if min_length is not None:
            return kept, float(visible.sum())
        shape = call_shape(call)
        found = [forecast(shape, selector, density) for density in (kept / visible).tolist()]
        seconds = [prediction.sparse_seconds / len(found) for prediction in found]
        return torch.tensor(seconds, dtype=torch.float64), found[0].dense_seconds


def with_head_thresholds(selector: Selector, thresholds: tuple[float, ...]) -> UniSparse:
    """A `UniSparse` with thresholds of its heads instead of one."""
    assert isinstance(selector, UniSparse)
    return replace(selector, threshold=None, head_thresholds=thresholds)


def refuse_call(call: SdpaCall, selector: Selector, min_length: int | None) -> DenseReason | None:
    """Why a call could not be sparse, its speed aside; ``None`` where it could."""
    config = SparseConfig.of_model(selector, min_length=min_length or 0)
    reason = refuse(call, config)
    if reason is None and min_length is None and not flex_lowers(call):
        return DenseReason.NO_KERNEL
    return reason


@torch.no_grad()
def measure_layers(
    model: nn.Module,
    runs: Sequence[Callable[[], Any]],
    ladder: Sequence[Selector],
    *,
    min_length: int | None,
    per_head: bool,
    keep: Callable[[Any], None],
    display: Progress,
) -> dict[str, LayerMeasure]:
    """Runs the dense model and measures every setting at each of its attention calls.

    No call's tensors are kept after it.

    Args:
        model: As `optimize` takes it; left as it came.
        runs: Each runs the model on one batch.
        ladder: The settings, of one block size.
        min_length: As `optimize` takes it.
        per_head: See `LayerMeasure`.
        keep: Gets each output of the model.
        display: Told of every call.

    Returns:
        Every module that made attention calls, by the name that `explain` uses, in the order of
        their first calls.
    """
    layers: dict[str, LayerMeasure] = {}
    path: list[str] = []
    batch = 0

    def observe(call: SdpaCall, *_: Any) -> None:
        display.show(f"{path[-1]}, batch {batch} of {len(runs)}")
        if path[-1] not in layers:
            layers[path[-1]] = LayerMeasure(len(ladder), per_head=per_head)
        layers[path[-1]].add(call, ladder, min_length)

    with ExitStack() as stack:
        stack.callback(release_all, model)
        optimize_layers(model, {})
        for name, module in layer_modules(model).items():
            track_layer(stack, module, name, path)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(observe_calls(observe))
        for run in runs:
            batch += 1
            keep(run())
    return layers
