"""A kernel is bound anew for what Triton compiles anew for, and only then."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from unisparse_flex.block_masks.kernels.launch import WIDE, Launch
from unisparse_flex.block_masks.kernels.recording import Recordings, empty

triton: Any = pytest.importorskip("triton")
TensorDescriptor: Any = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor


class Kernel:
    """Stands for a kernel of ``tensor``, ``general``, ``special``, ``factor`` and ``SIZE``."""

    def __init__(self) -> None:
        self.params = [
            SimpleNamespace(name=name, is_constexpr=name == "SIZE", do_not_specialize=general)
            for name, general in [
                ("tensor", False),
                ("general", True),
                ("special", False),
                ("factor", True),
                ("SIZE", False),
            ]
        ]
        self.bound: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def bind(*arguments: Any, **constants: Any) -> Any:
            self.bound.append((grid, arguments, constants))
            return CompiledKernel(self.launched)

        return bind


class CompiledKernel:
    """What a kernel is once it is compiled."""

    def __init__(self, launched: list[tuple[Any, ...]]) -> None:
        self.launched = launched

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.launched.append((grid, arguments))


TENSOR = torch.zeros(64)
FIRST: dict[str, Any] = {"tensor": TENSOR, "general": 7, "special": 3, "factor": 0.5, "SIZE": 8}


def launch(kernel: Launch, grid: tuple[int, int, int] = (1, 1, 1), **changed: Any) -> None:
    given = FIRST | changed
    constants = {"SIZE": given.pop("SIZE"), "num_warps": given.pop("num_warps", 4)}
    kernel(grid, *given.values(), **constants)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"tensor": torch.ones(8)},
        {"general": 1},
        {"general": 16},
        {"special": 5},
        {"factor": 2.0},
        {"grid": (3, 2, 1)},
    ],
)
def test_a_call_of_the_same_kind_is_launched_with_all_its_arguments(
    changed: dict[str, Any],
) -> None:
    fake = Kernel()
    kernel = Launch(fake)
    launch(kernel)
    launch(kernel, **changed)
    assert len(fake.bound) == 1
    given = FIRST | {name: value for name, value in changed.items() if name != "grid"}
    [(grid, arguments)] = fake.launched
    assert grid == changed.get("grid", (1, 1, 1))
    assert all(found is wanted for found, wanted in zip(arguments, given.values(), strict=True))


@pytest.mark.parametrize(
    "changed",
    [
        {"tensor": TENSOR.half()},
        {"tensor": TENSOR[1:]},
        {"tensor": torch.empty(64, device="meta")},
        {"general": WIDE},
        {"special": WIDE + 1},
        {"special": 1},
        {"special": 32},
        {"SIZE": 16},
        {"num_warps": 8},
    ],
)
def test_a_call_of_another_kind_is_bound_anew(changed: dict[str, Any]) -> None:
    fake = Kernel()
    kernel = Launch(fake)
    launch(kernel)
    launch(kernel, **changed)
    launch(kernel, **changed)
    launch(kernel)
    assert len(fake.bound) == 2
    assert len(fake.launched) == 2


def test_a_kernel_that_compiles_to_nothing_is_bound_every_time() -> None:
    fake = Kernel()
    kernel = Launch(fake)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Kernel, "__getitem__", lambda self, grid: lambda *a, **k: fake.bound.append(a)
        )
        launch(kernel)
        launch(kernel)
    assert len(fake.bound) == 2


class RunKernel(CompiledKernel):
    """One that can be launched without its hooks."""

    function, packed_metadata = 11, (4, 1, 0)

    def run(self, *arguments: Any) -> None:
        self.launched.append(arguments)


class RunKernels(Kernel):
    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments, **constants: RunKernel(self.launched)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver whose stream is 5 on every device."""
    active = SimpleNamespace(get_current_stream=lambda _: 5)
    monkeypatch.setattr(triton.runtime.driver, "_active", active)


def repeated(kernel: Launch, first: Tensor, second: Tensor) -> list[Tensor]:
    """What a call returns that was recorded with other tensors."""
    recordings = Recordings()

    def compute(given: Tensor) -> list[Tensor]:
        made = [empty(given, (3,)), empty(given, (64,), torch.int32)]
        descriptor = TensorDescriptor(given, given.shape, given.stride(), [64])
        kernel((3, 2, 1), made[1], 7, descriptor, 0.5, SIZE=8)
        kernel((1, 1, 1), made[1], 8, made[0], 0.5, SIZE=8)
        return made[:1]

    recordings.run("kind", [first], partial(compute, first))
    return list(recordings.run("kind", [second], partial(compute, second)))


@pytest.mark.usefixtures("driver")
def test_a_repeated_launch_is_given_its_own_addresses_and_the_stream() -> None:
    fake = RunKernels()
    first, second = torch.zeros(64), torch.ones(64)
    (output,) = repeated(Launch(fake), first, second)
    own = (11, (4, 1, 0), None, None, None)
    assert output.shape == (3,)
    one, other = fake.launched[-2:]
    assert one[:4] == (3, 2, 1, 5)
    assert other[:4] == (1, 1, 1, 5)
    assert one[4:9] == other[4:9] == own
    scratch, number, descriptor, factor, size = one[9:]
    assert (number, factor, size) == (7, 0.5, 8)
    assert descriptor.base.data_ptr() == second.data_ptr()
    assert (descriptor.shape, descriptor.block_shape) == (first.shape, [64])
    assert other[9:] == (scratch, 8, output.data_ptr(), 0.5, 8)
    assert scratch not in (0, second.data_ptr(), output.data_ptr())


@pytest.mark.usefixtures("driver")
def test_launches_that_somebody_watches_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = RunKernels()
    hooks = SimpleNamespace(calls=[print])
    monkeypatch.setattr(triton.knobs.runtime, "launch_exit_hook", hooks)
    repeated(Launch(fake), torch.zeros(64), torch.ones(64))
    # Of the second call, by what calls the hooks.
    assert [grid for grid, _ in fake.launched] == [(3, 2, 1), (1, 1, 1)]
