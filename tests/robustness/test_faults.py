"""Whatever goes wrong midway: dense after `restore`, sparse at the next try, nothing left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.api.capture import captured
from tests.api.models import FINE, Transformer, create, embeddings
from unisparse_flex import Selector, calibrate, explain, is_optimized, optimize, restore
from unisparse_flex.block_masks import UniSparse
from unisparse_flex.passes.attend import marker
from unisparse_flex.passes.rewrite import inductor
from unisparse_flex.selectors import BlockSelection

from .untouched import assert_as_before, assert_nothing_is_left, state_of

X = embeddings(200)
ERRORS = [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError]
any_error = pytest.mark.parametrize("error", ERRORS)

# Anything that ends the calls of a test early.
Stop = type[BaseException]


def run(model: Any, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


LAYERS = (1, 2)
DENSE = {n: run(create(layers=n)) for n in LAYERS}
SPARSE = {n: run(optimize(create(layers=n), FINE, min_length=0)) for n in LAYERS}


@contextmanager
def raising(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Stop, *, after: int = 0
) -> Iterator[None]:
    """Inside, a function raises at each call but the first ``after``."""
    function, calls = getattr(owner, name), iter(range(10**6))

    def fails(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= after:
            raise error("injected")
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        yield


def assert_recovers(model: Any, state: list[Any]) -> None:
    """Asserts that an optimized model still runs sparse, and dense once it is restored."""
    dense, sparse = DENSE[len(model.layers)], SPARSE[len(model.layers)]
    assert_nothing_is_left()
    assert run(model).equal(sparse)
    assert run(optimize(model, FINE, min_length=0)).equal(sparse)
    assert run(restore(model)).equal(dense)
    assert_as_before(model, state)


def optimized(layers: int = 2) -> tuple[Any, list[Any]]:
    model = create(layers=layers)
    state = state_of(model)
    return optimize(model, FINE, min_length=0), state


@any_error
@pytest.mark.parametrize("layer", [0, 1])
def test_a_kernel_that_fails(layer: int, error: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = optimized()
    name = "attend_masked_in_chunks"
    with (
        raising(monkeypatch, marker, name, error, after=layer),
        pytest.raises(error, match="injected"),
    ):
        run(model)
    assert_recovers(model, state)


@any_error
def test_a_compiled_kernel_that_fails(error: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where eager calls run compiled."""

    def fails(*_: Any) -> Tensor:
        raise error("injected")

    model, state = optimized()
    with monkeypatch.context() as patch:
        patch.setattr(marker, "_runs_compiled", lambda call: True)
        patch.setattr(marker, "_compiled_sdpa", lambda *_: fails)
        with pytest.raises(error, match="injected"):
            run(model)
    assert_recovers(model, state)


@any_error
def test_a_selection_that_fails(error: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = optimized()
    with (
        raising(monkeypatch, UniSparse, "compute_selection", error, after=1),
        pytest.raises(error, match="injected"),
    ):
        run(model)
    assert_recovers(model, state)


@any_error
def test_a_layer_that_fails_behind_attention(error: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = optimized()
    with (
        raising(monkeypatch, nn.GELU, "forward", error, after=1),
        pytest.raises(error, match="injected"),
    ):
        run(model)
    assert_recovers(model, state)


@any_error
@pytest.mark.parametrize("after", range(5))
def test_an_optimize_that_stops_halfway(
    after: int, error: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = create()
    state = state_of(model)
    optimizing = sys.modules[optimize.__module__]
    with (
        raising(monkeypatch, optimizing, "intercept", error, after=after),
        pytest.raises(error, match="injected"),
    ):
        optimize(model, FINE, min_length=0)
    assert run(restore(model)).equal(DENSE[2])
    assert_as_before(model, state)
    optimize(model, FINE, min_length=0)
    assert_recovers(model, state)


@any_error
@pytest.mark.parametrize("restores", [False, True])
def test_a_backend_that_fails_in_the_middle_of_a_compile(error: Stop, restores: bool) -> None:
    def backend(gm: Any, _: Any) -> Any:
        raise error("injected")

    torch._dynamo.reset()
    model, state = optimized(layers=1)
    with pytest.raises((error, torch._dynamo.exc.TorchDynamoException), match="injected"):
        run(torch.compile(model, backend=backend, fullgraph=True))
    assert_nothing_is_left()
    if restores:
        assert captured(restore(model), X).marked() == [0]
        optimize(model, FINE, min_length=0)
    again = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(again), SPARSE[1])
    assert_recovers(model, state)


@any_error
def test_a_selection_that_fails_while_it_is_traced(
    error: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    model, state = optimized(layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with (
        raising(monkeypatch, UniSparse, "compute_selection", error),
        pytest.raises((error, torch._dynamo.exc.TorchDynamoException), match="injected"),
    ):
        run(compiled)
    torch.testing.assert_close(run(compiled), SPARSE[1])
    assert_recovers(model, state)
    torch.testing.assert_close(run(compiled), DENSE[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
@any_error
def test_a_pass_that_fails_in_the_middle_of_a_compile(
    error: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    model, state = optimized(layers=1)
    compiled = torch.compile(model, fullgraph=True)
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        raising(monkeypatch, inductor, "rewrite_sdpa", error),
        pytest.raises((error, torch._dynamo.exc.TorchDynamoException), match="injected") as raised,
    ):
        run(compiled)
    assert "injected" in str(raised.value)
    torch.testing.assert_close(run(compiled), SPARSE[1], rtol=1e-4, atol=1e-5)
    assert_recovers(model, state)


LADDER = [FINE, UniSparse(block_size=16, c_q=4, c_k=4, top_k=5)]
CALIBRATING: dict[str, Callable[[nn.Module], Any]] = {
    "recall": lambda model: calibrate(model, [X], recall=0.9, ladder=LADDER, min_length=0),
    "kl": lambda model: calibrate(model, [X], kl=1e-3, ladder=LADDER, min_length=0),
    "explain": lambda model: explain(model, X),
}


@any_error
@pytest.mark.parametrize(
    ("calibrating", "owner", "name", "after"),
    [
        ("recall", nn.GELU, "forward", 0),
        ("recall", nn.GELU, "forward", 1),
        ("recall", UniSparse, "compute_selection", 2),
        ("kl", UniSparse, "compute_selection", 1),
        # Each setting selects once, and the first once more: then it is the KL that is measured.
        ("kl", UniSparse, "compute_selection", 6),
        ("kl", nn.GELU, "forward", 3),
        ("explain", nn.GELU, "forward", 1),
    ],
)
def test_a_calibration_that_stops(
    calibrating: str,
    owner: Any,
    name: str,
    after: int,
    error: Stop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = create()
    state = state_of(model)
    with (
        raising(monkeypatch, owner, name, error, after=after),
        pytest.raises(error, match="injected"),
    ):
        CALIBRATING[calibrating](model)
    assert_as_before(model, state)
    assert run(model).equal(DENSE[2])
    CALIBRATING[calibrating](model)
    assert_as_before(model, state)


class Failing(UniSparse):
    """A selector that raises."""

    def compute_selection(self, *_: Any, **__: Any) -> BlockSelection:
        raise ZeroDivisionError("of the selector")


def test_a_selector_that_raises_is_heard_and_can_be_replaced() -> None:
    model = create()
    state = state_of(model)
    selector: Selector = Failing(block_size=16)
    optimize(model, selector, min_length=0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="of the selector"):
            run(model)
    with pytest.raises(ZeroDivisionError, match="of the selector"):
        explain(model, X)
    assert is_optimized(model)
    optimize(model, FINE, min_length=0)
    assert_recovers(model, state)


def test_the_layers_here_are_those_that_the_tests_count() -> None:
    assert isinstance(create(), Transformer)
    assert all(not SPARSE[n].equal(DENSE[n]) for n in LAYERS)
