"""The kernels read of a mask tensor what PyTorch's operators do."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.block_masks.test_mask_contents import CASES, LENGTH, masks
from unisparse_flex.block_masks.kernels import mask_reading
from unisparse_flex.block_masks.kernels.recording import Recordings
from unisparse_flex.block_masks.masks import read_mask

from .calls import CPU
from .interpreter import Kernels


@pytest.fixture(autouse=True, scope="module")
def interpreted_reading(kernels: Kernels) -> Iterator[None]:
    """Masks are read by the interpreted kernels, in small parts and blocks."""
    with pytest.MonkeyPatch.context() as patch:
        for module_name in ("read", "turn"):
            module = getattr(kernels, module_name)
            patch.setitem(sys.modules, f"{mask_reading.__package__}.{module_name}", module)
        patch.setattr(mask_reading, "_reads", lambda mask: bool(mask.numel()))
        for name, value in {"ROWS": 8, "KEYS": 8, "WIDTH": 4, "PARTS": 2, "STEP": 2}.items():
            patch.setattr(kernels.read, name, value)
        yield


def assert_read_alike(mask: Tensor, q_len: int, kv_len: int) -> None:
    expected = read_mask(mask, q_len=q_len, kv_len=kv_len)
    # The second one repeats what was recorded of the first.
    for _ in range(2):
        found = mask_reading.read_mask(mask, q_len=q_len, kv_len=kv_len)
        if expected is None or found is None:
            assert found is expected
            continue
        for name in ("causal_offset", "text", "number", "in_window", "tables"):
            assert getattr(found, name) == getattr(expected, name), name
        for ours, theirs in zip(found.tensors, expected.tensors, strict=True):
            assert ours.dtype is theirs.dtype
            assert ours.equal(theirs)


@settings(max_examples=60)
@given(
    mask=masks(),
    dtype=st.sampled_from((torch.bool, torch.float16, torch.bfloat16, torch.float32)),
    infinite=st.booleans(),
)
def test_what_is_read_is_what_pytorch_reads(
    mask: Tensor, dtype: torch.dtype, infinite: bool
) -> None:
    given_mask = mask
    if dtype is not torch.bool:
        hidden = -torch.inf if infinite else torch.finfo(dtype).min
        given_mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, hidden)
    assert_read_alike(given_mask, *mask.shape[2:])


@pytest.mark.parametrize("name", CASES)
def test_masks_of_models_are_read_alike(name: str) -> None:
    mask = CASES[name][0]
    q_len = mask.shape[-2] if mask.shape[-2] > 1 else LENGTH
    assert_read_alike(mask, q_len, mask.shape[-1])


@pytest.mark.parametrize(
    "mask",
    [
        torch.full((9, 9), 0.5),
        torch.full((9, 9), torch.nan),
        torch.zeros(9, 9).fill_diagonal_(torch.inf),
        torch.zeros(9, 9, dtype=torch.bool),
        torch.ones(9, 9, dtype=torch.bool).fill_diagonal_(False),
        torch.ones(3, 4, 9, 9, dtype=torch.bool).tril(),
        torch.ones(1, 1, 9, 9, dtype=torch.bool).tril().expand(3, 4, 9, 9),
        torch.ones(18, 18, dtype=torch.bool).tril()[::2, ::2],
        torch.ones(9, 9, dtype=torch.bool).tril().T,
        torch.eye(9, dtype=torch.bool),
    ],
)
def test_masks_that_say_little_are_read_alike(mask: Tensor) -> None:
    assert_read_alike(mask, mask.shape[-2], mask.shape[-1])


def test_a_gpu_proves_that_it_reads(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROWS": 64, "KEYS": 128, "WIDTH": 64, "PARTS": 16}.items():
        monkeypatch.setattr(kernels.read, name, value)
    monkeypatch.setattr(mask_reading, "_recordings", Recordings())
    assert not mask_reading.find_reading_failure(CPU)
    monkeypatch.setattr(mask_reading, "_recordings", Recordings())

    def shifted(mask: Tensor, q_len: int) -> list[Tensor]:
        facts, *tables = read(mask, q_len)
        return [facts, *(table.roll(1, -1) for table in tables)]

    read = kernels.read.read
    monkeypatch.setattr(kernels.read, "read", shifted)
    assert "other tables" in mask_reading.find_reading_failure(CPU)
    monkeypatch.setattr(kernels.read, "read", read)
    monkeypatch.setattr(mask_reading, "_recordings", Recordings())
    monkeypatch.setattr(kernels.turn, "_launch", lambda *_, **__: 1 / 0)
    assert "ZeroDivisionError" in mask_reading.find_reading_failure(CPU)
