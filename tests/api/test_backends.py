"""Other ways to a sparse graph, and what stands in their way: breaks, autocast, inference mode."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unisparse_flex import optimize
from unisparse_flex.backend import unisparse
from unisparse_flex.selectors import DEFAULT_SELECTOR

from .capture import Capture, captured
from .models import FINE, SELECTOR, Attention, Layer, create, embeddings
from .reference import (
    assert_computes,
    assert_is_sparse,
    defined_output,
    rmse,
)

X = embeddings(200)


class Broken(nn.Module):
    """Two layers with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer(), Layer()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


class Checkpointed(nn.Module):
    """One layer behind activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


def run(model: Any, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.fixture
def intercepting(monkeypatch: pytest.MonkeyPatch) -> Capture:
    """Runs what backend="unisparse" hands to Inductor as it is."""
    capture = Capture()
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: capture(gm, inputs)
    )
    torch._dynamo.reset()
    return capture


@pytest.mark.slow
def test_the_backend_makes_a_model_sparse_that_was_not_optimized() -> None:
    torch._dynamo.reset()
    model = create(Attention)
    options: dict[str, Any] = {"selector": SELECTOR, "min_length": 100, "max_autotune": False}
    compiled = torch.compile(model, backend="unisparse", options=options, fullgraph=True)
    assert_is_sparse(run(compiled), model, SELECTOR, X)


def test_the_backend_keeps_calls_below_min_length_dense(intercepting: Capture) -> None:
    options: dict[str, Any] = {"selector": SELECTOR, "min_length": 201}
    model = create()
    compiled = torch.compile(model, backend="unisparse", options=options, fullgraph=True)
    assert_computes(run(compiled), model, None, X)
    assert intercepting.marked() == [0]


def test_the_backend_without_options_is_dense_below_its_default_length(
    intercepting: Capture,
) -> None:
    run(torch.compile(create(), backend="unisparse", fullgraph=True))
    assert intercepting.marked() == [0]
    run(torch.compile(create(Attention), backend=unisparse, fullgraph=True), embeddings(8192))
    assert intercepting.configs()[1][0].selector == DEFAULT_SELECTOR


def test_the_backend_leaves_an_optimized_model_its_settings(intercepting: Capture) -> None:
    model = optimize(create(), FINE, min_length=0)
    options: dict[str, Any] = {"selector": SELECTOR, "min_length": 0}
    compiled = torch.compile(model, backend="unisparse", options=options, fullgraph=True)
    assert_is_sparse(run(compiled), create(), FINE, X)
    assert [config.selector for config in intercepting.configs()[0]] == [FINE, FINE]


def test_the_backend_reaches_into_checkpointed_layers(intercepting: Capture) -> None:
    model = create(Checkpointed)
    options: dict[str, Any] = {"selector": SELECTOR, "min_length": 0}
    torch.compile(model, backend="unisparse", options=options, fullgraph=True)(X)
    assert intercepting.marked() == [1]


def test_the_backend_takes_a_selector_as_text(intercepting: Capture) -> None:
    options: dict[str, Any] = {"selector": SELECTOR.text, "min_length": 0}
    torch.compile(create(Attention), backend="unisparse", options=options, fullgraph=True)(X)
    assert [config.selector for config in intercepting.configs()[0]] == [SELECTOR]


def test_the_backend_refuses_what_is_no_selector(intercepting: Capture) -> None:
    options: dict[str, Any] = {"selector": 0.95}
    compiled = torch.compile(create(Attention), backend="unisparse", options=options)
    with pytest.raises(Exception, match="selector must be a selector"):
        run(compiled)


def test_both_halves_of_a_broken_graph_are_sparse() -> None:
    model = create(Broken)
    optimized = optimize(copy.deepcopy(model), SELECTOR, min_length=0)
    assert captured(optimized, X, fullgraph=False).marked() == [1, 1]
    assert_is_sparse(run(torch.compile(optimized, backend="aot_eager")), model, SELECTOR, X)


def test_checkpointed_layers_are_caught() -> None:
    optimized = optimize(create(Checkpointed), SELECTOR, min_length=0)
    torch._dynamo.reset()
    capture = Capture()
    torch.compile(optimized, backend=capture, fullgraph=True)(X)
    assert capture.marked() == [1]


@pytest.mark.parametrize("dynamic", [False, True])
def test_autocast_reaches_a_compiled_model(dynamic: bool) -> None:
    torch._dynamo.reset()
    model = create(Attention)
    exact = defined_output(model, SELECTOR, X)
    optimize(model, SELECTOR, min_length=0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with torch.autocast("cpu", torch.bfloat16):
        output, eager = run(compiled), run(model)
    assert output.dtype is torch.bfloat16
    assert rmse(output, eager) < 2.0**-7
    assert rmse(output, exact) < 0.1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_inference_mode_reaches_a_compiled_model(backend: str) -> None:
    torch._dynamo.reset()
    model = create(Attention)
    optimized = optimize(copy.deepcopy(model), SELECTOR, min_length=0)
    with torch.inference_mode():
        output = torch.compile(optimized, backend=backend, fullgraph=True)(X)
    assert_is_sparse(output.clone(), model, SELECTOR, X)


def test_a_model_in_bfloat16_compiles() -> None:
    torch._dynamo.reset()
    model, x = create(Attention).bfloat16(), X.bfloat16()
    optimized = optimize(copy.deepcopy(model), SELECTOR, min_length=0)
    output = run(torch.compile(optimized, backend="aot_eager", fullgraph=True), x)
    assert output.dtype is torch.bfloat16
    assert rmse(output, run(optimized, x)) < 2.0**-7


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_reach_a_compiled_model(kind: str) -> None:
    torch._dynamo.reset()
    causal = torch.ones(200, 200, dtype=torch.bool).tril()
    mask = causal if kind == "bool" else torch.zeros(200, 200).masked_fill(~causal, -torch.inf)
    model = create(Attention)
    optimized = optimize(copy.deepcopy(model), SELECTOR, min_length=0)
    compiled = torch.compile(optimized, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_is_sparse(compiled(X, mask), model, SELECTOR, X, mask)


def test_an_optimized_model_is_exported_with_its_settings() -> None:
    model = create()
    optimized = optimize(copy.deepcopy(model), SELECTOR, min_length=0)
    with torch.no_grad():
        program = torch.export.export(optimized, (X,))
    marked = [n for n in program.graph.nodes if "unisparse" in str(n.target)]
    assert len(marked) == 2
    assert_is_sparse(run(program.module()), model, SELECTOR, X)
