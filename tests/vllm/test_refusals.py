"""What is not plain attention goes to the parent as it came, and is counted with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unisparse_flex import UniSparse
from unisparse_flex.integrations.vllm import Reason, read_counts
from unisparse_flex.integrations.vllm.create_backend import Split, create_backend
from unisparse_flex.integrations.vllm.kernels import CpuKernel
from unisparse_flex.integrations.vllm.layer_state import LayerState
from unisparse_flex.integrations.vllm.sparse_rows import SparseRows

from .engine import ALL_BLOCKS, Answer, ask, differ_by, prompt_of, serving

PROMPTS = [prompt_of(length, length) for length in (300, 50)]
Change = Callable[[int, Any], tuple[int, Any]]
BATCHES: dict[Reason, Change] = {
    Reason.CASCADE: lambda prefix, common: (128, common),
    Reason.PREFIX_IMAGES: lambda prefix, common: (prefix, common.replace(mm_req_doc_ranges={})),
    Reason.SPLIT_BATCH: lambda prefix, common: (
        prefix,
        common.replace(seq_lens_cpu_upper_bound=None),
    ),
}


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[Answer]:
    with serving(llama, None) as engine:
        return ask(engine, PROMPTS)


def test_batches_that_are_not_plain_are_the_parents(
    llama: Path, expected: list[Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unisparse_flex.integrations.vllm.cpu import CpuBackend

    builder = CpuBackend.get_builder_cls()
    build = builder.build
    refused: list[Reason] = []

    def changed(self: Any, prefix: int, common: Any, fast_build: bool = False) -> Any:
        for reason in refused:
            prefix, common = BATCHES[reason](prefix, common)
        return build(self, prefix, common, fast_build)

    monkeypatch.setattr(builder, "build", changed)
    with serving(llama, ALL_BLOCKS) as engine:
        assert differ_by(ask(engine, PROMPTS), expected) < 1e-4
        assert read_counts().sparse_rows == 1
        for reason in BATCHES:
            refused[:] = [reason]
            before = read_counts()
            assert differ_by(ask(engine, PROMPTS), expected) == 0
            after = read_counts()
            assert after.sparse_rows == before.sparse_rows
            assert after.dense_rows[reason] == 1


class Parent:
    """A backend that writes down what it is asked for."""

    class Builder:
        pass

    class Impl:
        num_heads, head_size = 8, 64

        def __init__(self) -> None:
            self.asked: list[tuple[Any, ...]] = []

        def forward(self, *arguments: Any) -> torch.Tensor:
            self.asked.append(arguments)
            return torch.zeros(1)

    @classmethod
    def get_builder_cls(cls) -> type:
        return cls.Builder

    @classmethod
    def get_impl_cls(cls) -> type:
        return cls.Impl


@pytest.mark.parametrize("block_scale", [False, True])
def test_an_output_that_is_quantised_on_the_way_is_the_parents(block_scale: bool) -> None:
    impl = create_backend(Parent, CpuKernel()).get_impl_cls()()
    impl.unisparse = LayerState("a", CpuKernel(), UniSparse(), None)
    tensors = [torch.empty(1) for _ in range(4)]
    rows = SparseRows([], torch.device("cpu"))
    split = Split(rows, None, None, None, torch.empty(0))
    metadata, output, scale = SimpleNamespace(unisparse=split), torch.empty(1), torch.ones(1)
    scales = (None, scale) if block_scale else (scale, None)
    impl.forward(None, *tensors, metadata, output, *scales)
    [asked] = impl.asked
    given = None, *tensors, metadata, output, *scales
    assert all(a is b for a, b in zip(asked, given, strict=True))
    assert read_counts().dense_calls == {Reason.QUANTIZED_OUTPUT: 1}


def test_layers_that_stay_dense_are_the_parents(llama: Path, expected: list[Answer]) -> None:
    # As sparse as can be, were it not for dense_layers.
    settings = {"selector": "UniSparse(top_k=1)", "min_length": 0, "dense_layers": [0, 1]}
    with serving(llama, settings) as engine:
        assert differ_by(ask(engine, PROMPTS), expected) == 0
    assert read_counts().sparse_rows == 0
