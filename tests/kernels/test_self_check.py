"""Kernels that are wrong on a GPU are found out there, and stay off."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from unisparse_flex.block_masks.block_lists import BlockLists
from unisparse_flex.block_masks.kernels import KernelSettings, self_check
from unisparse_flex.block_masks.key_intervals import interval_tables

from .interpreter import Kernels

CPU = torch.device("cpu")
KIND = "some GPU"


@pytest.fixture(scope="module")
def interpreted_lists(kernels: Kernels) -> Callable[..., BlockLists]:
    """`operator.select_lists` by interpreted kernels; what is changed in ``fault`` goes wrong."""

    def select(
        query: Any, key: Any, settings: KernelSettings, *, fault: dict[str, Any], **given: Any
    ) -> Any:
        geometry = given["geometry"]
        intervals = None
        if geometry.mask is not None and "mask" not in fault:
            intervals = interval_tables(
                geometry,
                CPU,
                c_q=settings.c_q,
                c_k=settings.c_k,
                sampled_queries=settings.sampled_queries,
                sink_blocks=settings.sink_blocks,
                last_query_blocks=settings.last_query_blocks,
            )
        changed = {name: value for name, value in fault.items() if name in given}
        return kernels.lists.compute_lists(
            query,
            key,
            settings,
            intervals=intervals,
            **given | changed | {"geometry": dataclasses.replace(geometry, mask=None)},
        )

    return select


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that the interpreter makes in seconds."""
    for name, value in (("HEADS", 2), ("KEY_HEADS", 1), ("LENGTH", 420), ("HEAD_DIM", 16)):
        monkeypatch.setattr(self_check, name, value)
    monkeypatch.setattr(self_check, "THRESHOLDS", (0.12,))


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({}, ""),
        ({"scale": 0.15}, "bfloat16 without a mask: "),
        ({"mask": None}, "float32 with padding: "),
    ],
)
def test_what_kernels_do_wrong_is_found(
    interpreted_lists: Callable[..., BlockLists], fault: dict[str, Any], expected: str
) -> None:
    found = self_check.find_failure(
        CPU, lambda *args, **kwargs: interpreted_lists(*args, fault=fault, **kwargs)
    )
    assert found == expected if not expected else found.startswith(expected)
    assert not expected or "blocks differ" in found


def test_a_block_in_the_wrong_list_is_found(
    interpreted_lists: Callable[..., BlockLists],
) -> None:
    def swapped(*args: Any, **kwargs: Any) -> BlockLists:
        partial_counts, partial, full_counts, full = interpreted_lists(
            *args, fault={}, **kwargs
        ).tensors()
        return BlockLists(full_counts, full, partial_counts, partial)

    assert "lists of partial blocks differ" in self_check.find_failure(CPU, swapped)


def test_kernels_that_do_not_compile_are_a_failure_too() -> None:
    def broken(*_: Any, **__: Any) -> BlockLists:
        raise RuntimeError("out of resource: shared memory\nand more")

    found = self_check.find_failure(CPU, broken)
    assert found == "bfloat16 without a mask: RuntimeError: out of resource: shared memory"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A GPU whose kernels fail; what is found is appended each time."""
    made: list[str] = []

    def find(*_: Any) -> str:
        made.append("3 of 9 blocks differ")
        return made[-1]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_check, "gpu_kind", lambda _: KIND)
    monkeypatch.setattr(self_check, "find_failure", find)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    return made


def test_a_failure_is_remembered_and_said(
    checks: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            assert self_check.failure_of(0, lambda: None) == "3 of 9 blocks differ"  # type: ignore[arg-type,return-value]
    assert len(checks) == 1
    assert caplog.text.count(KIND) == 2
    [file] = tmp_path.rglob("*.json")
    assert json.loads(file.read_text()) == {KIND: checks[0]}


@pytest.mark.parametrize("content", ["", "[1, 2]", "{"])
def test_a_broken_file_is_found_out_anew(checks: list[str], tmp_path: Path, content: str) -> None:
    file = tmp_path / "unisparse_flex" / "self_check.json"
    file.parent.mkdir()
    file.write_text(content)
    self_check.failure_of(0, lambda: None)  # type: ignore[arg-type,return-value]
    assert json.loads(file.read_text()) == {KIND: checks[0]}


def test_it_is_no_part_of_a_graph_that_is_traced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str] = []

    def find(*_: Any) -> str:
        seen.append(type(torch.zeros(1)).__name__)
        return ""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_check, "gpu_kind", lambda _: KIND)
    monkeypatch.setattr(self_check, "find_failure", find)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    with torch._subclasses.FakeTensorMode():
        assert type(torch.zeros(1)).__name__ == "FakeTensor"
        assert self_check.failure_of(0, lambda: None) == ""  # type: ignore[arg-type,return-value]
    assert seen == ["Tensor"]
