"""A kernel is bound anew for what Triton compiles anew for, and only then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unisparse_flex.block_masks.kernels.launch import WIDE, Launch


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
