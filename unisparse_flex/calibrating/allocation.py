"""One choice for every unit of a model: least cost for the attention mass that they drop together.

A unit is a layer, or a head of one.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

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


class Frontier(Sequence[Allocation]):
    """Allocations that minimise ``cost + multiplier * dropped``, for every multiplier there is.

    From the cheapest to the one that drops least; consecutive ones differ in one unit. One
    multiplier serves all units: each step trades cost for mass where that is cheapest. No
    allocation that drops as little as one of these costs less.

    Args:
        units: The choices of each unit.
    """

    def __init__(self, units: Units) -> None:
        hulls = [_hull(choices) for choices in units]
        steps = [
            (-_gain(units[i][a], units[i][b]), i, position, b)
            for i, hull in enumerate(hulls)
            for position, (a, b) in enumerate(itertools.pairwise(hull))
        ]
        self._start = [hull[0] for hull in hulls]
        self._steps = [(unit, choice) for _, unit, _, choice in sorted(steps)]

    def __len__(self) -> int:
        return len(self._steps) + 1

    @overload
    def __getitem__(self, index: int) -> Allocation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Allocation]: ...
    def __getitem__(self, index: int | slice) -> Allocation | list[Allocation]:
        positions = range(len(self))[index]
        if isinstance(positions, range):
            return [self[i] for i in positions]
        current = list(self._start)
        for unit, choice in self._steps[:positions]:
            current[unit] = choice
        return tuple(current)


def allocate(units: Units, max_dropped: float) -> Allocation:
    """The cheapest allocation found that drops at most ``max_dropped``.

    The best of the `Frontier` and of the same choice for every unit, each then made cheaper unit
    by unit as far as the mass that is left over allows.

    Args:
        units: As many choices for each unit, in the same order.
        max_dropped: Mass that all units may drop together.

    Raises:
        ValueError: No allocation drops so little.
    """

    def reaches(allocation: Allocation) -> bool:
        return total_dropped(units, allocation) <= max_dropped

    frontier = Frontier(units)
    cheapest = bisect_left(range(len(frontier)), True, key=lambda i: reaches(frontier[i]))
    starts = frontier[cheapest : cheapest + 1]
    starts += [(choice,) * len(units) for choice in range(len(units[0]))]
    found = [_tighten(units, start, max_dropped) for start in starts if reaches(start)]
    if not found:
        raise ValueError(f"max_dropped must be reached by some allocation, got {max_dropped}")
    return min(found, key=lambda allocation: (total_cost(units, allocation), allocation))


def _tighten(units: Units, start: Allocation, max_dropped: float) -> Allocation:
    """Takes savings of one unit, greatest first, while ``max_dropped`` allows."""
    while (tighter := _tighten_once(units, start, max_dropped)) != start:
        start = tighter
    return start


def _tighten_once(units: Units, start: Allocation, max_dropped: float) -> Allocation:
    current, dropped = start, total_dropped(units, start)
    moves = [
        (choice.cost - choices[now].cost, unit, index)
        for unit, (choices, now) in enumerate(zip(units, start, strict=True))
        for index, choice in enumerate(choices)
        if choice.cost < choices[now].cost
    ]
    for _, unit, index in sorted(moves):
        now, choice = units[unit][current[unit]], units[unit][index]
        if choice.cost >= now.cost or dropped - now.dropped + choice.dropped > max_dropped:
            continue
        moved = (*current[:unit], index, *current[unit + 1 :])
        # Summed anew: differences round.
        if (total := total_dropped(units, moved)) <= max_dropped:
            current, dropped = moved, total
    return current


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
