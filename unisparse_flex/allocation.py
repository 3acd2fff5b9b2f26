"""One choice for every layer: least cost for the attention mass that they drop together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Allocation = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One way to run the attention of one layer.

    Attributes:
        cost: What it takes, in any unit that all layers share.
        dropped: Share of dense attention's mass that it drops, in [0, 1].
    """

    cost: float
    dropped: float


Layers = Sequence[Sequence[Choice]]


def mean_dropped(layers: Layers, allocation: Allocation) -> float:
    """Share of mass dropped, the mean over layers."""
    return math.fsum(_chosen(layers, allocation, lambda c: c.dropped)) / len(layers)


def total_cost(layers: Layers, allocation: Allocation) -> float:
    """Cost of all layers together."""
    return math.fsum(_chosen(layers, allocation, lambda c: c.cost))


def frontier(layers: Layers) -> list[Allocation]:
    """Allocations that minimise ``cost + multiplier * dropped``, for every multiplier there is.

    One multiplier serves all layers: each step trades cost for mass where that is cheapest. No
    allocation that drops as little as one of these costs less.

    Args:
        layers: The choices of each layer, at least one.

    Returns:
        From the cheapest to the one that drops least; consecutive ones differ in one layer.
    """
    hulls = [_hull(choices) for choices in layers]
    steps = [
        (-_gain(layers[i][a], layers[i][b]), i, position, b)
        for i, hull in enumerate(hulls)
        for position, (a, b) in enumerate(zip(hull, hull[1:], strict=False))
    ]
    current = [hull[0] for hull in hulls]
    found = [tuple(current)]
    for _, layer, _, choice in sorted(steps):
        current[layer] = choice
        found.append(tuple(current))
    return found


def allocate(layers: Layers, max_dropped: float) -> Allocation:
    """The cheapest allocation found that drops at most ``max_dropped`` in the mean.

    The best of the `frontier` and of the same choice for every layer, each then made cheaper layer
    by layer as far as the mass that is left over allows.

    Args:
        layers: As many choices for each layer, in the same order.
        max_dropped: Mean share of mass, in [0, 1].

    Raises:
        ValueError: No allocation drops so little.
    """

    def reaches(allocation: Allocation) -> bool:
        return mean_dropped(layers, allocation) <= max_dropped

    starts = [next((a for a in frontier(layers) if reaches(a)), None)]
    starts += [(choice,) * len(layers) for choice in range(len(layers[0]))]
    found = [_tighten(layers, a, max_dropped) for a in starts if a is not None and reaches(a)]
    if not found:
        raise ValueError(f"max_dropped must be reached by some allocation, got {max_dropped}")
    return min(found, key=lambda allocation: (total_cost(layers, allocation), allocation))


def _tighten(layers: Layers, start: Allocation, max_dropped: float) -> Allocation:
    """Takes the greatest saving of one layer that keeps to ``max_dropped`` until there is none."""
    current = list(start)
    while True:
        slack = (max_dropped - mean_dropped(layers, tuple(current))) * len(layers)
        moves = [
            (choice.cost - now.cost, layer, index)
            for layer, choices in enumerate(layers)
            for now in (choices[current[layer]],)
            for index, choice in enumerate(choices)
            if choice.cost < now.cost and choice.dropped - now.dropped <= slack
        ]
        for _, layer, index in sorted(moves):
            moved = (*current[:layer], index, *current[layer + 1 :])
            # The slack is rounded: the sum decides.
            if mean_dropped(layers, moved) <= max_dropped:
                current = list(moved)
                break
        else:
            return tuple(current)


def _hull(choices: Sequence[Choice]) -> list[int]:
    """Indices on the lower convex hull of dropped mass over cost, cheapest first."""
    order = sorted(range(len(choices)), key=lambda i: (choices[i].cost, choices[i].dropped, i))
    hull: list[int] = []
    for index in order:
        if hull and choices[index].dropped >= choices[hull[-1]].dropped:
            continue
        while len(hull) > 1 and _gain(choices[hull[-2]], choices[hull[-1]]) <= _gain(
            choices[hull[-1]], choices[index]
        ):
            hull.pop()
        hull.append(index)
    return hull


def _gain(first: Choice, second: Choice) -> float:
    """Mass gained for each unit of cost between two choices of one layer."""
    return (first.dropped - second.dropped) / (second.cost - first.cost)


def _chosen(
    layers: Layers, allocation: Allocation, value: Callable[[Choice], float]
) -> list[float]:
    return [value(choices[i]) for choices, i in zip(layers, allocation, strict=True)]
