"""The kernels make of a mask the tables that plain PyTorch makes."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.block_masks import BlockGeometry
from unisparse_flex.block_masks.kernels import mask_tables
from unisparse_flex.block_masks.kernels.recording import Recordings
from unisparse_flex.block_masks.key_intervals import interval_tables
from unisparse_flex.block_masks.masks import MaskProgram

from .calls import CPU
from .interpreter import Kernels
from .test_intervals import MaskedCall, masked_calls

NAMES = (
    *("rows", "composites", "samples", "blocks", "key_blocks", "key_weights", "key_valid"),
    "row_valid",
)
SETTINGS = {"c_q": 4, "c_k": 4, "sampled_queries": 2, "sink_blocks": 1, "last_query_blocks": 1}


@pytest.fixture(autouse=True)
def interpreted(kernels: Kernels) -> Iterator[None]:
    """Tables are made by the interpreted kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, f"{mask_tables.__package__}.intervals", kernels.intervals)
        yield


def assert_same_tables(
    text: str,
    tensors: tuple[Tensor, ...],
    geometry: BlockGeometry,
    *,
    batch: int,
    numbers: tuple[int, ...] = (),
    **options: int,
) -> None:
    given_settings = SETTINGS | options
    program = MaskProgram.parse(
        text,
        tensors=tensors,
        numbers=numbers,
        batch=batch,
        q_len=geometry.q_len,
        kv_len=geometry.kv_len,
    )
    masked = BlockGeometry(
        q_len=geometry.q_len,
        kv_len=geometry.kv_len,
        block_size=geometry.block_size,
        causal_offset=geometry.causal_offset,
        mask=program,
    )
    expected = interval_tables(masked, CPU, **given_settings).tensors()
    # The second one repeats what was recorded of the first.
    for _ in range(2):
        found = mask_tables.tables_of_mask(
            text, tensors, numbers, geometry=geometry, batch=batch, device=CPU, **given_settings
        )
        for name, ours, theirs in zip(NAMES, found, expected, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
            if name == "key_weights":
                # PyTorch's logarithm on the CPU differs from one place in a tensor to another.
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
            else:
                assert ours.equal(theirs), name


@settings(max_examples=60)
@given(data=st.data())
def test_tables_are_those_of_plain_pytorch(data: st.DataObject) -> None:
    masked: MaskedCall = data.draw(masked_calls(rule="top_k"))
    selector, call = masked.call.selector, masked.call
    assert_same_tables(
        masked.text,
        masked.tensors,
        call.geometry,
        batch=call.batch,
        c_q=selector.c_q,
        c_k=selector.c_k,
        sampled_queries=selector.sampled_queries,
        sink_blocks=selector.sink_blocks,
        last_query_blocks=selector.last_query_blocks,
    )


@settings(max_examples=30)
@given(
    length=st.integers(1, 300),
    padding=st.integers(0, 300),
    blocks=st.integers(0, 4),
    both=st.booleans(),
)
@example(length=129, padding=128, blocks=1, both=False)
@example(length=128, padding=127, blocks=2, both=True)
@example(length=1, padding=1, blocks=1, both=False)
def test_padding_of_any_length(length: int, padding: int, blocks: int, both: bool) -> None:
    valid = torch.arange(length) >= padding
    text = "(t0[kv]) & (t1[q])" if both else "t0[kv]"
    geometry = BlockGeometry(q_len=length, kv_len=length, block_size=128, causal_offset=0)
    assert_same_tables(
        text,
        (valid, valid),
        geometry,
        batch=1,
        sink_blocks=blocks,
        last_query_blocks=blocks,
        c_q=16,
        c_k=64,
        sampled_queries=4,
    )


CASES: dict[str, tuple[str, tuple[Tensor, ...], tuple[int, ...]]] = {
    "documents of one token": ("t0[b, q] == t0[b, kv]", (torch.arange(70).expand(2, -1),), ()),
    "documents that return": ("t0[b, q] == t0[b, kv]", (torch.arange(140).view(2, 70) % 3,), ()),
    "ids of another type": ("t0[q] == t0[kv]", ((torch.arange(70) // 9).to(torch.int32),), ()),
    "rows of one key": ("(t0[q] <= kv) & (kv <= t0[q])", (torch.arange(70).flip(0),), ()),
    "rows of no key": ("t0[b, q]", (torch.zeros(2, 70, dtype=torch.bool),), ()),
    "keys of no row": ("t0[kv]", (torch.zeros(70, dtype=torch.bool),), ()),
    "two windows": ("(q < kv + n0) & (q <= kv + n1) & (kv < q + n2)", (), (9, 30, 5)),
    "ends out of range": (
        "(t0[b, q] <= kv) & (kv <= t1[q])",
        (torch.arange(140).view(2, 70) - 90, torch.arange(70) * 3 - 50),
        (),
    ),
    "a token's number": ("t0[b, 0] <= kv", (torch.tensor([[3], [50]]),), ()),
    "strided": (
        "(t0[b, kv]) & (t1[q])",
        (torch.ones(70, 2).bool().T, torch.ones(140).bool()[::2]),
        (),
    ),
}


@pytest.mark.parametrize("offset", [None, 0])
@pytest.mark.parametrize("name", CASES)
def test_masks_at_the_edge(name: str, offset: int | None) -> None:
    text, tensors, numbers = CASES[name]
    geometry = BlockGeometry(q_len=70, kv_len=70, block_size=16, causal_offset=offset)
    for options in (
        {},
        {"c_q": 0},
        {"sampled_queries": 0},
        {"last_query_blocks": 3, "sink_blocks": 0},
        {"c_q": 1, "c_k": 1, "sampled_queries": 16},
        {"c_q": 16, "c_k": 16, "sampled_queries": 1},
    ):
        assert_same_tables(text, tensors, geometry, batch=2, numbers=numbers, **options)


@pytest.mark.parametrize("step", [1, 2, 16])
def test_blocks_are_looked_at_in_steps(kernels: Kernels, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for share in (0.02, 0.5):
        valid = torch.rand((2, 150), generator=generator) < share
        geometry = BlockGeometry(q_len=150, kv_len=150, block_size=16, causal_offset=0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels.intervals, "STEP_BLOCKS", step)
            patch.setattr(mask_tables, "_recordings", Recordings())
            assert_same_tables(
                "t0[b, kv]", (valid,), geometry, batch=2, sink_blocks=3, last_query_blocks=3
            )
