"""Threads that share models, or change models of their own, do not meet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.api.models import FINE, SELECTOR, Attention, create, embeddings
from unisparse_flex import is_optimized, optimize, restore
from unisparse_flex.catching import dispatch_key as dispatch
from unisparse_flex.catching import modules as interception

from .untouched import assert_nothing_is_left

THREADS = 4
LENGTHS = (40, 90, 130, 200)


def run(model: nn.Module, length: int) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(embeddings(length))
    return output


def in_threads(*works: Callable[[], None]) -> None:
    """Runs all at once; what one raises is raised here."""
    ready = threading.Barrier(len(works))

    def start(work: Callable[[], None]) -> None:
        ready.wait()
        work()
        assert_nothing_is_left()

    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(start, work) for work in works]:
            future.result()
    assert_nothing_is_left()


def test_a_shared_model_computes_in_every_thread_what_it_does_in_one() -> None:
    model = optimize(create(), FINE, min_length=0)
    expected = {length: run(model, length) for length in LENGTHS}

    def work() -> None:
        for _ in range(5):
            for length in LENGTHS:
                assert run(model, length).equal(expected[length])

    in_threads(*[work] * THREADS)


def test_models_that_are_optimized_and_restored_beside_it_change_nothing() -> None:
    shared, untouched = optimize(create(), FINE, min_length=0), create()
    sparse, dense = run(shared, 130), run(untouched, 130)
    other = run(optimize(create(), SELECTOR, min_length=0), 130)
    assert len({float(x.sum()) for x in (sparse, dense, other)}) == 3

    def call() -> None:
        for _ in range(20):
            assert run(shared, 130).equal(sparse)
            assert run(untouched, 130).equal(dense)

    # Made here: a seed is that of all threads.
    models = [create(), create()]

    def change() -> None:
        model = models.pop()
        for _ in range(20):
            assert run(optimize(model, SELECTOR, min_length=0), 130).equal(other)
            assert run(restore(model), 130).equal(dense)

    in_threads(call, change, call, change)
    assert is_optimized(shared)
    assert not is_optimized(untouched)


def test_a_model_that_is_restored_meanwhile_is_sparse_or_dense() -> None:
    model = create(Attention)
    dense = run(model, 130)
    sparse = run(optimize(model, FINE, min_length=0), 130)
    seen = []

    def call() -> None:
        seen.extend([run(model, 130) for _ in range(50)])

    def change() -> None:
        for _ in range(50):
            optimize(restore(model), FINE, min_length=0)

    in_threads(call, change, call)
    assert all(output.equal(sparse) or output.equal(dense) for output in seen)
    assert run(model, 130).equal(sparse)


def test_a_compiled_model_is_shared() -> None:
    torch._dynamo.reset()
    model = optimize(create(Attention), FINE, min_length=0)
    expected = {length: run(model, length) for length in LENGTHS}
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)

    def work() -> None:
        for length in LENGTHS:
            torch.testing.assert_close(run(compiled, length), expected[length])

    in_threads(*[work] * THREADS)


def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
    def waits(*args: Any) -> Any:
        time.sleep(0.05)
        return function(*args)

    return waits


def test_two_threads_make_one_subclass_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Attention):
        pass

    monkeypatch.setattr(interception, "_make_subclass", slowly(interception._make_subclass))
    models = [create(Own) for _ in range(THREADS)]
    in_threads(*[lambda m=model: optimize(m, FINE) for model in models])
    assert len({type(model) for model in models}) == 1


def test_two_threads_set_one_key_up(monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []
    most: list[int] = []

    def find() -> Any:
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()
        return dispatch._key

    monkeypatch.setattr(dispatch, "_find_key", find)
    in_threads(*[dispatch.set_up_key] * THREADS)
    assert most == [1] * THREADS
