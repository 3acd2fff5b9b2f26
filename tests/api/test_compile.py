"""`optimize`, then torch.compile with Inductor: right, sparse, and few graphs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from unisparse_flex import UniSparse, optimize

from .capture import GraphCount, captured
from .models import FINE, SELECTOR, Attention, Transformer, create, embeddings
from .reference import (
    ByDefinition,
    assert_computes,
    assert_is_sparse,
    defined_output,
    rmse,
)

MIN_LENGTH = 128
LENGTHS = (300, 333, 640, 129)
SHORT_LENGTHS = (100, 50)
AUTOMATIC_LENGTHS = (250, 300, 411, 160, 513)


@dataclass
class Compiled:
    """A model before and after, what it returned for each length, and how often it compiled."""

    model: Any
    optimized: Any
    outputs: dict[int, Tensor]
    graphs: dict[int, int]


def compile_and_run(
    model: Any, selector: Any, lengths: tuple[int, ...], **options: Any
) -> Compiled:
    optimized = optimize(copy.deepcopy(model), selector, min_length=MIN_LENGTH)
    run = torch.compile(optimized, fullgraph=True, **options)
    outputs, graphs, count = {}, {}, GraphCount()
    for length in lengths:
        with torch.no_grad():
            outputs[length] = run(embeddings(length))
        graphs[length] = int(count)
    return Compiled(model, optimized, outputs, graphs)


@pytest.fixture(scope="module")
def dynamic() -> Compiled:
    torch._dynamo.reset()
    return compile_and_run(create(), SELECTOR, LENGTHS + SHORT_LENGTHS, dynamic=True)


@pytest.fixture(scope="module")
def automatic(dynamic: Compiled) -> Compiled:
    """A second model with settings of its own, compiled for one length, then for any."""
    return compile_and_run(create(Attention), FINE, AUTOMATIC_LENGTHS)


@pytest.fixture(scope="module")
def plain(dynamic: Compiled, automatic: Compiled) -> Any:
    return torch.compile(create(Attention, seed=1), fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
def test_a_compiled_model_computes_attention_over_the_selected_blocks(
    dynamic: Compiled, length: int
) -> None:
    assert_is_sparse(dynamic.outputs[length], dynamic.model, SELECTOR, embeddings(length))


@pytest.mark.slow
@pytest.mark.parametrize("length", SHORT_LENGTHS)
def test_a_compiled_model_is_dense_below_min_length(dynamic: Compiled, length: int) -> None:
    assert_computes(dynamic.outputs[length], dynamic.model, None, embeddings(length))


@pytest.mark.slow
def test_one_dynamic_graph_serves_every_length_from_min_length_and_one_the_rest(
    dynamic: Compiled,
) -> None:
    assert [dynamic.graphs[length] for length in LENGTHS] == [1] * len(LENGTHS)
    assert [dynamic.graphs[length] for length in SHORT_LENGTHS] == [2] * len(SHORT_LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize("length", AUTOMATIC_LENGTHS)
def test_a_second_model_keeps_its_own_settings(automatic: Compiled, length: int) -> None:
    assert_is_sparse(automatic.outputs[length], automatic.model, FINE, embeddings(length))


@pytest.mark.slow
def test_lengths_that_change_compile_at_most_three_graphs(automatic: Compiled) -> None:
    assert automatic.graphs[AUTOMATIC_LENGTHS[0]] == 1
    assert automatic.graphs[AUTOMATIC_LENGTHS[-1]] <= 3


@pytest.mark.slow
def test_the_first_model_keeps_its_settings_beside_a_second(
    dynamic: Compiled, automatic: Compiled
) -> None:
    run = torch.compile(dynamic.optimized, fullgraph=True, dynamic=True)
    with torch.no_grad():
        assert run(embeddings(300)).equal(dynamic.outputs[300])


@pytest.mark.slow
def test_a_plain_model_of_the_same_class_is_untouched(plain: Any) -> None:
    x = embeddings(250)
    with torch.no_grad():
        output = plain(x)
    assert_computes(output, plain._orig_mod, None, x)
    assert captured(plain._orig_mod, x).marked() == [0]


def test_a_captured_graph_holds_one_marked_call_per_layer() -> None:
    model = optimize(create(), SELECTOR, min_length=MIN_LENGTH)
    (configs,) = captured(model, embeddings(200)).configs()
    assert [(c.selector, c.min_length) for c in configs] == [(SELECTOR, MIN_LENGTH)] * 2


def test_a_class_that_its_library_allows_in_graphs_is_traced() -> None:
    @torch._dynamo.allow_in_graph
    class Allowed(Attention):
        pass

    model = optimize(create(Allowed), SELECTOR, min_length=MIN_LENGTH)
    assert captured(torch.nn.Sequential(model), embeddings(200)).marked() == [1]


def test_settings_stay_constants_where_several_models_are_compiled() -> None:
    torch._dynamo.reset()
    for block_size in (16, 32, 64):
        selector = UniSparse(block_size=block_size, top_p=0.5)
        model = create(layers=1)
        optimized = optimize(copy.deepcopy(model), selector, min_length=block_size)
        run = torch.compile(optimized, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert_is_sparse(run(embeddings(200)), model, selector, embeddings(200))


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_backend_computes_what_eager_does(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    model = create(Attention)
    optimized = optimize(copy.deepcopy(model), SELECTOR, min_length=MIN_LENGTH)
    run = torch.compile(optimized, backend=backend, fullgraph=True, dynamic=dynamic)
    for length in (300, 333, 100):
        x = embeddings(length)
        with torch.no_grad():
            output = run(x)
            assert rmse(output, optimized(x)) < 1e-6
        assert_computes(output, model, SELECTOR if length >= MIN_LENGTH else None, x)


def test_everything_kept_is_dense_attention() -> None:
    x, model = embeddings(300), create(layers=1)
    exact = defined_output(model, None, x)
    optimized = optimize(model, UniSparse(block_size=32, top_p=1.0), min_length=0)
    with torch.no_grad():
        compiled = torch.compile(optimized, backend="aot_eager", fullgraph=True)
        assert rmse(optimized(x), exact) < 1e-6
        assert rmse(compiled(x), exact) < 1e-6


def test_the_models_here_lose_blocks() -> None:
    mode = ByDefinition(SELECTOR)
    with torch.no_grad(), mode:
        create(Transformer)(embeddings(300))
    assert len(mode.calls) == 2
    assert all(density < 0.8 for density in mode.densities())
