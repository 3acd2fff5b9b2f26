"""Tensors that a proved mask reads and that the graph does not compute yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...block_masks.masks import mask_table


@dataclass(frozen=True)
class Computed:
    """What a function makes of a node's tensor; stands for a node until the mask is proved.

    Attributes:
        source: The node.
        function: Takes the node's tensor and ``arguments``.
        arguments: Plain values, and other nodes.
        meta: What `recorded` reads of a node.
    """

    source: fx.Node
    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    meta: dict[str, Tensor] = field(compare=False, repr=False)

    def insert(self) -> fx.Node:
        """A node that computes it, right behind what it is computed from."""
        graph = self.source.graph
        given = (each for each in self.arguments if isinstance(each, fx.Node))
        after = max((self.source, *given))
        if after.op == "placeholder":
            # In front of them all would be an input of the graph.
            after = graph.find_nodes(op="placeholder")[-1]
        with graph.inserting_after(after):
            node = graph.call_function(self.function, (self.source, *self.arguments))
        node.meta.update(self.meta)
        return node

    @property
    def is_table(self) -> bool:
        """Whether it is one of rows or of keys."""
        return self.function is table_of_pairs

    def at(self, index: fx.Node, value: Tensor) -> Computed:
        """Of a table, the entries at the rows or keys that a node [T] names.

        Args:
            index: The node.
            value: What is recorded for it.
        """
        table = self.meta["example_value"]
        found = table.new_empty((*table.shape[:-1], *value.shape))
        return Computed(self.source, table_at, (index, *self.arguments), {"example_value": found})


def position_from_start(index: Tensor, size: int) -> Tensor:
    """Indices of a dimension, those that count from its end counted from its start."""
    return torch.where(index < 0, index + size, index)


def table_of_pairs(
    pairs: Tensor,
    name: str,
    shown: float,
    along: int | None,
    causal_offset: int | None,
    number: int | None,
) -> Tensor:
    """`mask_table` of a tensor of pairs [..., Sq, Skv].

    Args:
        pairs: The tensor.
        name: See `mask_table`.
        shown: The entry where a row sees a key.
        along: The one of its first dimensions along which it differs, if any.
        causal_offset: See `mask_table`.
        number: See `mask_table`.
    """
    kept = tuple(slice(None) if i == along else 0 for i in range(pairs.dim() - 2))
    seen = pairs[kept] == shown
    return mask_table(seen, name, causal_offset=causal_offset, number=number)


def table_at(pairs: Tensor, index: Tensor, *arguments: Any) -> Tensor:
    """`table_of_pairs`, looked up at indices [T]; those below 0 count from the end."""
    return table_of_pairs(pairs, *arguments)[..., index]
