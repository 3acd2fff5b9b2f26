"""Families behind Inductor: one graph, and the numbers of float64 over the same blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.api.capture import GraphCount
from tests.api.reference import rmse
from unisparse_flex import optimize

from .cells import Traced, in_float64
from .families import BY_NAME
from .family import SELECTOR
from .modes import forward, forward_padded
from .replay import recorded, replayed

CASES = {
    "Llama": forward,
    "Llama, right padding": forward_padded("right"),
    "Gemma 3": forward,
    "ViT": forward,
    "Flux": forward,
}

# Inductor rounds the sines of Flux's timestep by as much in the untouched model.
FACTORS = {"Flux": 10}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_compiled_family_is_one_graph_and_right_over_its_blocks(case: str) -> None:
    torch._dynamo.reset()
    family, run = BY_NAME[case.partition(",")[0]], CASES[case]
    untouched, inputs = family.create(), family.inputs()
    optimized: Any = optimize(copy.deepcopy(untouched), SELECTOR, min_length=0)
    traced = torch.compile(optimized, backend=Traced(), fullgraph=True)
    _, calls = recorded(lambda: run(traced, inputs))
    torch._dynamo.reset()
    count = GraphCount()
    output = run(torch.compile(optimized, fullgraph=True), inputs)
    assert int(count) == 1
    exact_inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    exact = replayed(lambda: run(in_float64(untouched), exact_inputs), calls, SELECTOR)
    plain = replayed(lambda: run(untouched, inputs), calls, SELECTOR)
    assert rmse(output, exact) <= FACTORS.get(case, 3) * rmse(plain, exact)
    assert rmse(output, run(untouched, inputs)) > 5e-3
