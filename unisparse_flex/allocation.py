"""One choice for every unit of a model: least cost for the attention mass that they drop together.

A unit is a layer, or a head of one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Allocation = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One way to compute the attention of one unit.

    Attributes:
        cost: What it takes, in any measure that all units share.
        dropped: Attention mass that it drops, in any measure that all units share.
    """

    cost: float
    dropped: float


Units = Sequence[Sequence[Choice]]


def total_dropped(units: Units, allocation: Allocation) -> float:
    """Mass that all units drop together."""
    return math.fsum(_chosen(units, allocation, lambda c: c.dropped))


def total_cost(units: Units, allocation: Allocation) -> float:
    """Cost of all units together."""
    return math.fsum(_chosen(units, allocation, lambda c: c.cost))


def frontier(units: Units) -> list[Allocation]:
    """Allocations that minimise ``cost + multiplier * dropped``, for every multiplier there is.

    One multiplier serves all units: each step trades cost for mass where that is cheapest. No
    allocation that drops as little as one of these costs less.

    Args:
        units: The choices of each unit, at least one.

    Returns:
        From the cheapest to the one that drops least; consecutive ones differ in one unit.
    """
    hulls = [_hull(choices) for choices in units]
    steps = [
        (-_gain(units[i][a], units[i][b]), i, position, b)
        for i, hull in enumerate(hulls)
        for position, (a, b) in enumerate(itertools.pairwise(hull))
    ]
    current = [hull[0] for hull in hulls]
    found = [tuple(current)]
    for _, unit, _, choice in sorted(steps):
        current[unit] = choice
        found.append(tuple(current))
    return found


def allocate(units: Units, max_dropped: float) -> Allocation:
    """The cheapest allocation found that drops at most ``max_dropped``.

    The best of the `frontier` and of the same choice for every unit, each then made cheaper unit
    by unit as far as the mass that is left over allows.

    Args:
        units: As many choices for each unit, in the same order.
        max_dropped: Mass that all units may drop together.

    Raises:
        ValueError: No allocation drops so little.
    """

    def reaches(allocation: Allocation) -> bool:
        return total_dropped(units, allocation) <= max_dropped

    starts = [next((a for a in frontier(units) if reaches(a)), None)]
    starts += [(choice,) * len(units) for choice in range(len(units[0]))]
    found = [_tighten(units, a, max_dropped) for a in starts if a is not None and reaches(a)]
    if not found:
        raise ValueError(f"max_dropped must be reached by some allocation, got {max_dropped}")
    return min(found, key=lambda allocation: (total_cost(units, allocation), allocation))


def _tighten(units: Units, start: Allocation, max_dropped: float) -> Allocation:
    """Takes savings of one unit, greatest first, while ``max_dropped`` allows."""
    current, dropped = list(start), total_dropped(units, start)
    moves = [
        (choice.cost - units[unit][start[unit]].cost, unit, index)
        for unit, choices in enumerate(units)
        for index, choice in enumerate(choices)
        if choice.cost < units[unit][start[unit]].cost
    ]
    for _, unit, index in sorted(moves):
        now, choice = units[unit][current[unit]], units[unit][index]
        if choice.cost >= now.cost or dropped - now.dropped + choice.dropped > max_dropped:
            continue
        moved = (*current[:unit], index, *current[unit + 1 :])
        # Summed anew: differences round.
        if total_dropped(units, moved) <= max_dropped:
            current, dropped = list(moved), total_dropped(units, moved)
    end = tuple(current)
    return end if end == start else _tighten(units, end, max_dropped)


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
    """Mass gained for each unit of cost between two choices of one unit."""
    return (first.dropped - second.dropped) / (second.cost - first.cost)


def _chosen(units: Units, allocation: Allocation, value: Callable[[Choice], float]) -> list[float]:
    return [value(choices[i]) for choices, i in zip(units, allocation, strict=True)]
