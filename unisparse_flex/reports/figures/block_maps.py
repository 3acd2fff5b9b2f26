"""The blocks that every attention call of a model keeps, head by head.

Symbols: B batch, Hq heads, Nq/Nk blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...block_masks import BlockSelection
from ...passes import SparseConfig, observe_calls
from ...passes.calls import SdpaCall
from ..explanation import record_attention


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerBlocks:
    """The blocks of one attention call, of the first sequence of the batch.

    Attributes:
        layer: Name of the module that made the call.
        keep: bool [Hq, Nq, Nk] on the CPU; ``None`` where the call stays dense.
        visible: bool [Hq, Nq, Nk] on the CPU: blocks that dense attention reads; ``None`` as
            above.
        block_size: Tokens per block; 0 where the call stays dense.
        q_len: Query rows.
        kv_len: Keys.
        reason: Why it stays dense; empty where it does not.
    """

    layer: str
    keep: Tensor | None = None
    visible: Tensor | None = None
    block_size: int = 0
    q_len: int = 0
    kv_len: int = 0
    reason: str = ""

    def head_densities(self) -> list[float]:
        """Kept over visible blocks of each head; empty where the call stays dense."""
        if self.keep is None or self.visible is None:
            return []
        kept = (self.keep & self.visible).flatten(1).sum(1, dtype=torch.float64)
        return (kept / self.visible.flatten(1).sum(1).clamp_min(1)).tolist()


def collect_blocks(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    show: Callable[[str], None] = lambda step: None,
) -> list[LayerBlocks]:
    """Runs ``model(**inputs)`` once, uncompiled, and keeps what every attention call selected.

    Args:
        model: An optimized model.
        inputs: Passed to the model by name.
        show: Told which layer comes next.

    Returns:
        One for each call, in their order.
    """
    found: dict[int, LayerBlocks] = {}
    with record_attention(model, as_compiled=True) as records:

        def observe(
            call: SdpaCall, config: SparseConfig, selection: BlockSelection | None, *_: Any
        ) -> None:
            layer = records[-1].layer
            show(layer)
            if selection is not None:
                found[len(records) - 1] = _layer_blocks(layer, call, selection)

        with observe_calls(observe), torch.no_grad():
            model(**inputs)
    return [
        found.get(index) or LayerBlocks(layer=record.layer, reason=str(record.reason or ""))
        for index, record in enumerate(records)
    ]


def _layer_blocks(layer: str, call: SdpaCall, selection: BlockSelection) -> LayerBlocks:
    heads, (rows, keys) = call.query.shape[1], selection.keep.shape[2:]
    shape = (selection.keep.shape[0], heads, rows, keys)
    keep, visible = (blocks.expand(shape)[0] for blocks in (selection.keep, selection.visible))
    return LayerBlocks(
        layer=layer,
        keep=keep.to("cpu", copy=True),
        visible=visible.to("cpu", copy=True),
        block_size=selection.geometry.block_size,
        q_len=call.query.shape[2],
        kv_len=call.key.shape[2],
    )
