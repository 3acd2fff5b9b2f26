"""What every setting of a ladder keeps of each layer's attention, on a dense model's own tensors.

Symbols: B batch, Hq heads, Nq/Nk blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .allocation import Choice
from .block_masks import Selector
from .block_mass import compute_block_mass
from .explain import track_layer
from .optimize import layer_modules, optimize_layers, restore
from .passes import (
    Reason,
    SdpaCall,
    SparseConfig,
    apply_autocast,
    call_geometry,
    call_shape,
    flex_lowers,
    forecast,
    observe_calls,
    refuse,
    select,
)
from .step_display import StepDisplay


class LayerMeasure:
    """Sums over the calls of one layer; lists hold an entry for each setting, dense last.

    Attributes:
        mass: Attention mass of the calls that could be sparse: 1 for each query row and head.
        visible: Blocks that dense attention reads there.
        dropped: Mass that each setting drops.
        kept: Blocks that each setting reads.
        cost: Predicted seconds of each setting, or the blocks that it reads.

    Args:
        settings: How many there are beside dense.
    """

    def __init__(self, settings: int) -> None:
        self.mass = self.visible = 0.0
        self.dropped, self.kept, self.cost = ([0.0] * (settings + 1) for _ in range(3))

    @property
    def could_be_sparse(self) -> bool:
        """Whether some call could, with some setting."""
        return self.visible > 0

    def choices(self) -> list[Choice]:
        """The settings as they are chosen from."""
        mass = self.mass or 1.0
        return [
            Choice(cost=cost, dropped=dropped / mass)
            for cost, dropped in zip(self.cost, self.dropped, strict=True)
        ]

    def add(self, call: SdpaCall, ladder: Sequence[Selector], min_length: int | None) -> None:
        """Adds a call of real tensors, if it could be sparse.

        Args:
            call: The call.
            ladder: The settings, of one block size.
            min_length: As `optimize` takes it.
        """
        usable = [refuse_call(call, selector, min_length) is None for selector in ladder]
        if not any(usable):
            return
        call = apply_autocast(call)
        configs = [SparseConfig(selector=selector) for selector in ladder]
        mass = compute_block_mass(call, call_geometry(call, configs[0]))
        self.mass += float(mass.sum(dtype=torch.float64))
        # Of each setting mass, blocks and cost; what it may not do runs dense.
        found: dict[int, tuple[float, float, float]] = {}
        visible = dense_cost = 0.0
        for i, config in enumerate(configs):
            if not usable[i]:
                continue
            selection = select(call, config)
            visible = float(selection.visible.expand(mass.shape).sum())
            kept = float(selection.keep.expand(mass.shape).sum())
            dropped = float(mass.masked_fill(selection.keep, 0.0).sum(dtype=torch.float64))
            cost, dense_cost = kept, visible
            if min_length is None:
                predicted = forecast(call_shape(call), config.selector, kept / visible)
                cost, dense_cost = predicted.sparse_seconds, predicted.dense_seconds
            found[i] = dropped, kept, cost
        self.visible += visible
        for i in range(len(ladder) + 1):
            dropped, kept, cost = found.get(i, (0.0, visible, dense_cost))
            self.dropped[i] += dropped
            self.kept[i] += kept
            self.cost[i] += cost


def refuse_call(call: SdpaCall, selector: Selector, min_length: int | None) -> Reason | None:
    """Why a call could not be sparse, its speed aside; ``None`` where it could."""
    config = SparseConfig(
        selector=selector, min_length=min_length or 0, min_queries=selector.block_size
    )
    reason = refuse(call, config)
    if reason is None and min_length is None and not flex_lowers(call):
        return Reason.NO_KERNEL
    return reason


@torch.no_grad()
def measure_layers(
    model: nn.Module,
    runs: Sequence[Callable[[], Any]],
    ladder: Sequence[Selector],
    *,
    min_length: int | None,
    keep: Callable[[Any], None],
    display: StepDisplay,
) -> dict[str, LayerMeasure]:
    """Runs the dense model and measures every setting at each of its attention calls.

    No call's tensors are kept behind it.

    Args:
        model: As `optimize` takes it; left as it came.
        runs: Each runs the model on one batch.
        ladder: The settings, of one block size.
        min_length: As `optimize` takes it.
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
        layers.setdefault(path[-1], LayerMeasure(len(ladder))).add(call, ladder, min_length)

    with ExitStack() as stack:
        stack.callback(restore, model)
        optimize_layers(model, {})
        for name, module in layer_modules(model).items():
            track_layer(stack, module, name, path)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(observe_calls(observe))
        for run in runs:
            batch += 1
            keep(run())
    return layers
