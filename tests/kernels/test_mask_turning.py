"""A padded mask is turned by the kernel as it is by PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex import UniSparse
from unisparse_flex.block_masks.kernels import mask_reading
from unisparse_flex.passes import SparseConfig
from unisparse_flex.passes.attend import alignment
from unisparse_flex.passes.calls import SdpaCall

from .interpreter import Kernels

BATCH = 2
CONFIG = SparseConfig(
    selector=UniSparse(block_size=16, c_q=4, c_k=4, sampled_queries=2, top_k=3), min_length=0
)


@pytest.fixture(autouse=True, scope="module")
def interpreted_turning(kernels: Kernels) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, f"{mask_reading.__package__}.turn", kernels.turn)
        patch.setattr(kernels.turn, "TOKENS", 16)
        yield


def call_of(text: str, tensors: list[Tensor], q_len: int, kv_len: int) -> SdpaCall:
    query = torch.zeros(BATCH, 2, q_len, 8)
    key = torch.zeros(BATCH, 2, kv_len, 8)
    return SdpaCall(query=query, key=key, value=key, mask=text, mask_tensors=tensors)


def assert_prepared_alike(call: SdpaCall, *, by_kernel: bool) -> None:
    expected = alignment.prepare_mask(call, CONFIG)
    turns: list[int] = []

    def turn(valid: Tensor, **sizes: int) -> list[Tensor]:
        turns.append(1)
        return mask_reading.turn_keys(valid, **sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "runs_mask_kernels", lambda _: True)
        patch.setattr(alignment, "turn_keys", turn)
        for _ in range(2):
            found = alignment.prepare_mask(call, CONFIG)
            assert len(found) == len(expected)
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.dtype is theirs.dtype
                assert ours.equal(theirs)
    assert len(turns) == 2 * by_kernel


@settings(max_examples=40)
@given(
    q_len=st.integers(1, 70),
    more=st.integers(0, 20),
    padding=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    holes=st.booleans(),
    of_batch=st.booleans(),
)
@example(q_len=33, more=0, padding=(33, 32), holes=False, of_batch=True)
@example(q_len=16, more=1, padding=(0, 16), holes=False, of_batch=False)
def test_padding_is_turned(
    q_len: int, more: int, padding: tuple[int, int], holes: bool, of_batch: bool
) -> None:
    kv_len = q_len + more
    valid = torch.arange(kv_len) >= torch.tensor(padding)[:, None]
    if holes:
        valid &= torch.arange(kv_len) % 5 != 3
    text, tensor = ("t0[b, kv]", valid) if of_batch else ("t0[kv]", valid[0])
    call = call_of(f"(kv <= q) & ({text})", [tensor], q_len, kv_len)
    assert_prepared_alike(call, by_kernel=True)


LENGTH = 50
VALID = torch.arange(LENGTH) >= torch.tensor([[7], [20]])
OTHERS: dict[str, tuple[str, list[Tensor], bool]] = {
    "nothing of keys": ("(kv <= q) & (t0[q] <= kv)", [torch.arange(LENGTH) // 9 * 9], False),
    "rows too": ("(kv <= q) & (t0[b, q]) & (t1[b, kv])", [VALID, VALID], False),
    "not causal": ("t0[b, kv]", [VALID], False),
    "a narrow window": ("(kv <= q) & (q < kv + 9) & (t0[b, kv])", [VALID], False),
    "documents": (
        "(kv <= q) & (t0[b, q] == t0[b, kv]) & (t1[b, kv])",
        [torch.arange(LENGTH).expand(2, -1) // 9, VALID],
        False,
    ),
    "a chunk": ("(kv <= q) & (q // 20 == kv // 20) & (t0[b, kv])", [VALID], False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_else_a_mask_reads_is_turned_by_pytorch(name: str) -> None:
    text, tensors, by_kernel = OTHERS[name]
    assert_prepared_alike(call_of(text, tensors, LENGTH, LENGTH), by_kernel=by_kernel)


def test_a_wide_window_is_turned() -> None:
    length = 16 * 20
    valid = torch.arange(length) >= torch.tensor([[7], [200]])
    call = call_of("(kv <= q) & (q < kv + 300) & (t0[b, kv])", [valid], length, length)
    assert_prepared_alike(call, by_kernel=True)
