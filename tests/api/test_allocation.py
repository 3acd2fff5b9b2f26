"""Allocations, against an exhaustive reading of every one there is."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisparse_flex.calibrating.allocation import (
    Allocation,
    Choice,
    Frontier,
    allocate,
    total_cost,
    total_dropped,
)

CHOICES = 4
# Whole numbers: sums are exact.
choices = st.builds(Choice, cost=st.integers(0, 20), dropped=st.integers(0, 20))
units = st.lists(st.lists(choices, min_size=CHOICES, max_size=CHOICES), min_size=1, max_size=4)


def every_allocation(of: list[list[Choice]]) -> list[Allocation]:
    return list(product(range(CHOICES), repeat=len(of)))


@settings(max_examples=100, deadline=None)
@given(units)
def test_nothing_drops_as_little_as_a_frontier_allocation_for_less(of: list[list[Choice]]) -> None:
    for found in Frontier(of):
        cost, dropped = total_cost(of, found), total_dropped(of, found)
        rivals = [a for a in every_allocation(of) if total_dropped(of, a) <= dropped]
        assert cost == min(total_cost(of, rival) for rival in rivals)


@settings(max_examples=100, deadline=None)
@given(units)
def test_the_frontier_runs_from_the_cheapest_to_the_least_dropped(of: list[list[Choice]]) -> None:
    found = list(Frontier(of))
    every = every_allocation(of)
    assert total_cost(of, found[0]) == min(total_cost(of, a) for a in every)
    assert total_dropped(of, found[-1]) == min(total_dropped(of, a) for a in every)
    for before, after in pairwise(found):
        assert total_cost(of, before) < total_cost(of, after)
        assert total_dropped(of, before) > total_dropped(of, after)
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


@settings(max_examples=100, deadline=None)
@given(units, st.integers(0, 80))
def test_an_allocation_keeps_its_budget_and_no_single_change_saves(
    of: list[list[Choice]], budget: int
) -> None:
    feasible = [a for a in every_allocation(of) if total_dropped(of, a) <= budget]
    if not feasible:
        with pytest.raises(ValueError, match=f"got {budget}"):
            allocate(of, budget)
        return
    found = allocate(of, budget)
    assert found in feasible
    near = [a for a in feasible if sum(x != y for x, y in zip(a, found, strict=True)) == 1]
    uniform = [a for a in feasible if len(set(a)) == 1]
    on_frontier = [a for a in Frontier(of) if a in feasible]
    rivals = near + uniform + on_frontier
    assert all(total_cost(of, found) <= total_cost(of, rival) for rival in rivals)
