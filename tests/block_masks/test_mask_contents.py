"""A mask tensor that is read says exactly its pairs; what most masks say is recognised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.block_masks.masks import MaskContents, MaskProgram, has_intervals, read_mask
from unisparse_flex.block_masks.masks import contents as contents_module


def pairs_of(found: MaskContents, batch: int, q_len: int, kv_len: int) -> Tensor:
    """bool [B, 1, Sq, Skv]."""
    row, key = torch.arange(q_len), torch.arange(kv_len)
    seen = torch.ones((batch, 1, q_len, kv_len), dtype=torch.bool)
    if found.causal_offset is not None:
        seen &= key <= row[:, None] + found.causal_offset
    if found.text:
        program = MaskProgram.parse(
            found.text,
            tensors=found.tensors,
            numbers=(found.number,),
            batch=batch,
            q_len=q_len,
            kv_len=kv_len,
        )
        assert has_intervals(program.expr)
        seen &= program.pairs(row, key)
    return seen


def causal(q_len: int, kv_len: int, offset: int = 0) -> Tensor:
    return torch.arange(kv_len) <= torch.arange(q_len)[:, None] + offset


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """Runs of keys by row, of which some are hidden from all rows or some rows see none."""
    batch, q_len = draw(st.integers(1, 3)), draw(st.integers(1, 30))
    kv_len = q_len + draw(st.integers(0, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    row, key = torch.arange(q_len)[:, None], torch.arange(kv_len)
    seen = torch.ones((batch, q_len, kv_len), dtype=torch.bool)
    kinds = ("causal", "chunk", "window", "left", "right", "holes", "rows", "documents", "prefix")
    for kind in draw(st.lists(st.sampled_from((*kinds, "runs")), max_size=3, unique=True)):
        edge = torch.randint(0, kv_len + 1, (batch, 1, 1), generator=generator)
        if kind == "causal":
            seen &= key <= row
        elif kind == "chunk":
            seen &= key <= row + kv_len - q_len
        elif kind == "window":
            seen &= key > row + draw(st.integers(-12, 12))
        elif kind == "left":
            seen &= key >= edge
        elif kind == "right":
            seen &= key < edge
        elif kind == "holes":
            seen &= torch.rand((batch, 1, kv_len), generator=generator) < 0.7
        elif kind == "rows":
            seen &= torch.rand((batch, q_len, 1), generator=generator) < 0.7
        elif kind == "documents":
            ids = (torch.rand((batch, kv_len), generator=generator) < 0.2).cumsum(-1)
            seen &= ids[:, :q_len, None] == ids[:, None]
        elif kind == "prefix":
            seen &= (key <= row) | (key < edge)
        else:
            ends = torch.randint(0, kv_len + 1, (2, batch, q_len, 1), generator=generator)
            seen &= (key >= ends[0]) & (key < ends[1])
    return seen[:, None]


@given(
    mask=masks(),
    additive=st.booleans(),
    chunk=st.sampled_from((1, 50, 2**28)),
    tile=st.sampled_from((1, 8, 128)),
)
def test_what_is_read_are_the_pairs(mask: Tensor, additive: bool, chunk: int, tile: int) -> None:
    given_mask = mask
    if additive:
        lowest = torch.finfo(torch.float32).min
        given_mask = torch.zeros(mask.shape).masked_fill(~mask, lowest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contents_module, "CHUNK_ENTRIES", chunk)
        patch.setattr(contents_module, "TILE", tile)
        found = read_mask(given_mask, q_len=mask.shape[2], kv_len=mask.shape[3])
    if found is None:
        assert not mask.any() or is_in_pieces(mask[:, 0])
    else:
        assert pairs_of(found, mask.shape[0], *mask.shape[2:]).equal(mask)


def is_in_pieces(seen: Tensor) -> bool:
    """Whether a key that some row sees lies between two of a row that does not see it."""
    from_left = seen.cumsum(-1) > 0
    from_right = seen.flip(-1).cumsum(-1).flip(-1) > 0
    return bool((from_left & from_right & ~seen & seen.any(1, keepdim=True)).any())


LENGTH = 40
PADDING = torch.tensor([0, 7, 39])
VALID = torch.arange(LENGTH) >= PADDING[:, None]
IDS = torch.arange(LENGTH) // 9
CASES = {
    "causal": (causal(LENGTH, LENGTH), 0, ""),
    "chunk of a prompt": (causal(16, LENGTH, 24), 24, ""),
    "static cache": (causal(16, LENGTH), 0, ""),
    "chunk in a static cache": (causal(16, LENGTH, 8), 8, ""),
    "padding": (causal(LENGTH, LENGTH) & VALID[:, None, None], 0, "(t0[b, kv])"),
    "padding of one": (causal(LENGTH, LENGTH) & VALID[1], 0, "(t0[kv])"),
    "window": (
        causal(LENGTH, LENGTH) & ~causal(LENGTH, LENGTH, -10),
        0,
        "(q < kv + 10)",
    ),
    "window, chunk": (causal(16, LENGTH, 24) & ~causal(16, LENGTH, 14), 24, "(q + n0 < kv)"),
    "documents": (
        causal(LENGTH, LENGTH) & (IDS[:, None] == IDS),
        0,
        "(t0[q] <= kv)",
    ),
    "padded encoder": (VALID[:, None, None], None, "(t0[b, kv])"),
    "nothing hidden": (torch.ones(LENGTH, LENGTH, dtype=torch.bool), None, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_what_most_masks_say_is_recognised(name: str) -> None:
    mask, offset, text = CASES[name]
    q_len, kv_len = mask.shape[-2] if mask.shape[-2] > 1 else LENGTH, mask.shape[-1]
    found = read_mask(mask, q_len=q_len, kv_len=kv_len)
    assert found is not None
    assert (found.causal_offset, found.text) == (offset, text)
    batch = max(1, mask.shape[0] if mask.dim() == 4 else 1)
    expected = mask.expand(batch, 1, q_len, kv_len)
    assert pairs_of(found, batch, q_len, kv_len).equal(expected)


@pytest.mark.parametrize(
    "mask",
    [
        torch.full((8, 8), 0.5),
        torch.arange(8)[:, None] * -0.1 + torch.zeros(8, 8),
        torch.stack([causal(8, 8), torch.ones(8, 8, dtype=torch.bool)])[None],
        torch.zeros(8, 8, dtype=torch.bool),
        torch.tensor([[True, False, True], [True, True, True]]),
        torch.tensor([[0.0, float("nan")]]),
    ],
    ids=["bias", "biases of distance", "heads", "nothing visible", "pieces", "nan"],
)
def test_other_masks_are_left_alone(mask: Tensor) -> None:
    assert read_mask(mask, q_len=mask.shape[-2], kv_len=mask.shape[-1]) is None


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("copied", [False, True])
def test_heads_that_share_a_mask_are_read(batch: int, copied: bool) -> None:
    mask = causal(8, 8).expand(batch, 4, 8, 8)
    mask = mask.clone() if copied else mask
    found = read_mask(mask, q_len=8, kv_len=8)
    assert found is not None
    assert (found.causal_offset, found.text) == (0, "")
    if copied:
        mask[-1, 3, 2, 1] = False
        assert read_mask(mask, q_len=8, kv_len=8) is None
