"""A left-padded row of a batch attends as the same prompt alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.passes.attend import marked_sdpa, observe_calls
from unisparse_flex.passes.attend.alignment import align
from unisparse_flex.passes.calls import SdpaCall, SparseConfig
from unisparse_flex.selectors import Selector, StreamingLLM, UniSparse, XAttention

BLOCK = 16
SELECTORS = [
    UniSparse(block_size=BLOCK, c_q=4, c_k=4, sampled_queries=2, top_k=3),
    UniSparse(block_size=BLOCK, c_q=4, c_k=4, sampled_queries=0, threshold=0.05),
    XAttention(block_size=BLOCK, stride=4),
    StreamingLLM(block_size=BLOCK, sink_tokens=4, local_tokens=20),
]


@dataclass(frozen=True)
class Kind:
    """A mask of a padded batch, and of a prompt alone.

    Attributes:
        text: The mask, ``t0`` what is padding.
        alone: The same without padding; empty where the causal flag says all of it.
        reads_ids: Whether ``t1`` holds the documents' ids.
    """

    text: str
    alone: str = ""
    reads_ids: bool = False


KINDS = {
    "padding": Kind("(kv <= q) & t0[b, kv]"),
    "padding by number": Kind("(0 < t2[b, 0, kv]) & (kv <= q)"),
    "prefix of rows": Kind("(kv <= q) & (t3[b] <= kv)"),
    "window": Kind("(kv <= q) & (q < kv + 70) & t0[b, kv]", "(kv <= q) & (q < kv + 70)"),
    "documents": Kind(
        "(kv <= q) & (t1[b, q] == t1[b, kv]) & t0[b, kv]",
        "(kv <= q) & (t1[b, q] == t1[b, kv])",
        reads_ids=True,
    ),
    "padded queries": Kind("(kv <= q) & t0[b, kv] & t0[b, q]"),
    # Sees positions as they are in the padded batch: equal for padding of whole chunks alone.
    "chunks of documents": Kind(
        "(kv <= q) & ((t4[b, q]) // 24 == (t4[b, kv]) // 24) & t0[b, kv]",
        "(kv <= q) & (q // 24 == kv // 24)",
    ),
}


def tensors(paddings: Sequence[int], length: int, seed: int) -> list[Tensor]:
    """``t0, t1, ...`` of `KINDS`."""
    generator = torch.Generator().manual_seed(seed)
    padding = torch.tensor(paddings)[:, None]
    position = torch.arange(length)
    valid = position >= padding
    ids = (torch.rand((len(paddings), length), generator=generator) < 0.05).cumsum(-1)
    own = (position - padding).clamp(min=0)
    return [valid, ids, valid[:, None].long(), padding[:, 0], own]


def call_of(text: str, inputs: Tensor, given: Sequence[Tensor]) -> SdpaCall:
    query, key, value = inputs
    call = SdpaCall(query=query, key=key[:, ::2], value=value[:, ::2], enable_gqa=True)
    return replace(call, mask=text, mask_tensors=list(given), is_causal=not text)


def attend(call: SdpaCall, selector: Selector) -> tuple[Tensor, Tensor]:
    """The output, and the blocks that were kept of the call as it was computed."""
    keep: list[Tensor] = []

    def note(_: object, __: object, selection: object, ___: object) -> None:
        keep.append(selection.keep)  # type: ignore[attr-defined]

    with observe_calls(note):
        output = marked_sdpa(call, SparseConfig(selector=selector, min_length=0).encode())
    return output, keep[0]


def shift_of(call: SdpaCall) -> list[int]:
    """How far the rows of a call are turned."""
    aligned = align(call, SparseConfig(selector=SELECTORS[1], min_length=0), traced=True)
    assert aligned is not None
    shifts: list[int] = aligned.shift.tolist()
    return shifts


@given(
    kind=st.sampled_from(list(KINDS)),
    selector=st.sampled_from(SELECTORS),
    paddings=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    length=st.integers(151, 200),
    seed=st.integers(0, 2**16),
)
@example(kind="padding", selector=SELECTORS[0], paddings=[BLOCK - 1, 0], length=160, seed=0)
@example(kind="documents", selector=SELECTORS[1], paddings=[150, 1], length=151, seed=1)
def test_a_padded_row_attends_as_its_prompt_alone(
    kind: str, selector: Selector, paddings: list[int], length: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, len(paddings), 4, length, 16)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    of_mask = tensors(paddings, length, seed)
    output, keep = attend(call_of(KINDS[kind].text, inputs, of_mask), selector)
    for row, padding in enumerate(paddings):
        own = slice(row, row + 1)
        given_alone = [of_mask[1][own, padding:]] if KINDS[kind].reads_ids else []
        text = KINDS[kind].alone.replace("t1", "t0")
        alone, kept_alone = attend(
            call_of(text, inputs[:, own, :, padding:], given_alone), selector
        )
        torch.testing.assert_close(output[own, :, padding:], alone, atol=1e-10, rtol=1e-10)
        assert not output[own, :, :padding].any()
        first = padding // BLOCK
        blocks = slice(first, first + kept_alone.shape[2])
        assert torch.equal(keep[own, :, blocks, blocks], kept_alone)
        assert not keep[own, :, :, :first].any()


@given(
    kind=st.sampled_from(["padding", "documents", "padded queries"]),
    additive=st.booleans(),
    paddings=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_a_mask_of_pairs_is_aligned_as_its_formula(
    kind: str, additive: bool, paddings: list[int], seed: int
) -> None:
    """What is a formula in a compiled model may be a tensor in the same model uncompiled."""
    length = 100
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn((3, len(paddings), 4, length, 16), generator=generator).double()
    of_mask = tensors(paddings, length, seed)
    call = call_of(KINDS[kind].text, inputs, of_mask)
    program = call.mask_program()
    assert program is not None
    position = torch.arange(length)
    pairs = program.pairs(position, position)
    if additive:
        pairs = torch.zeros(pairs.shape).double().masked_fill(~pairs, -torch.inf)
    by_pairs = replace(call, mask="", mask_tensors=None, attn_mask=pairs)
    assert shift_of(by_pairs) == shift_of(call) == [padding % BLOCK for padding in paddings]
    expected, _ = attend(call, SELECTORS[1])
    found, _ = attend(by_pairs, SELECTORS[1])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", ["padding", "documents"])
def test_gradients_are_those_of_the_prompt_alone(kind: str) -> None:
    paddings, length = [5, 0, 47], 120
    inputs = torch.randn((3, 3, 4, length, 16), dtype=torch.float64).requires_grad_()
    of_mask = tensors(paddings, length, seed=0)
    output, _ = attend(call_of(KINDS[kind].text, inputs, of_mask), SELECTORS[0])
    weights = torch.randn_like(output) * of_mask[0][:, None, :, None]
    (found,) = torch.autograd.grad((output * weights).sum(), inputs)
    for row, padding in enumerate(paddings):
        own = slice(row, row + 1)
        alone = inputs.detach()[:, own, :, padding:].requires_grad_()
        given_alone = [of_mask[1][own, padding:]] if KINDS[kind].reads_ids else []
        text = KINDS[kind].alone.replace("t1", "t0")
        result, _ = attend(call_of(text, alone, given_alone), SELECTORS[0])
        (expected,) = torch.autograd.grad((result * weights[own, :, padding:]).sum(), alone)
        torch.testing.assert_close(found[:, own, :, padding:], expected)
        assert not found[:, own, :, :padding].any()


@pytest.mark.parametrize(
    "text",
    [
        "t0[b, kv]",  # rows of padding see keys
        "(kv <= q + 3) & t0[b, kv]",  # a chunk's
        "(kv <= q) & (t1[b, q] == t1[b, kv])",  # no padding
        "(kv <= q) & (q < kv + 32) & t0[b, kv]",  # keeps its blocks without scores
        "(kv <= q) & (5 <= kv)",
    ],
)
def test_what_may_not_be_padded_on_the_left_stays_as_it_is(text: str) -> None:
    call = call_of(text, torch.randn(3, 2, 4, 70, 16), tensors([0, 9], 70, seed=0))
    assert align(call, SparseConfig(selector=SELECTORS[0], min_length=0), traced=True) is None


def test_a_mask_of_pairs_that_is_not_causal_stays_as_it_is() -> None:
    """Rows of padding see keys."""
    valid = tensors([0, 9], 70, seed=0)[0]
    call = call_of("", torch.randn(3, 2, 4, 70, 16), [])
    of_all_rows = valid[:, None, None, :].expand(-1, -1, 70, -1)
    causal = of_all_rows & torch.ones(70, 70, dtype=torch.bool).tril()
    for pairs, shifts in (
        (causal, [0, 9]),
        (of_all_rows.contiguous(), [0, 0]),
        (of_all_rows, None),
        (valid[:, None, None, :], None),
        (causal.expand(-1, 4, -1, -1).contiguous(), None),
    ):
        given_pairs = replace(call, is_causal=False, mask_tensors=None, attn_mask=pairs)
        if shifts is not None:
            assert shift_of(given_pairs) == shifts
        else:
            config = SparseConfig(selector=SELECTORS[1], min_length=0)
            assert align(given_pairs, config, traced=True) is None


def test_nothing_is_moved_where_nothing_is_padded() -> None:
    call = call_of(KINDS["padding"].text, torch.randn(3, 2, 4, 70, 16), tensors([0, 32], 70, 0))
    config = SparseConfig(selector=SELECTORS[0], min_length=0)
    assert align(call, config, traced=False) is None
    assert align(call, config, traced=True) is not None


@given(paddings=st.lists(st.integers(0, 60), min_size=1, max_size=3), seed=st.integers(0, 2**16))
def test_a_cache_that_is_longer_than_the_prompt_is_turned_with_it(
    paddings: list[int], seed: int
) -> None:
    length, room = 70, 33
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn((3, len(paddings), 4, length + room, 16), generator=generator).double()
    of_mask = tensors(paddings, length + room, seed)
    whole = call_of(KINDS["padding"].text, inputs, of_mask)
    output, _ = attend(replace(whole, query=whole.query[:, :, :length]), SELECTORS[1])
    for row, padding in enumerate(paddings):
        own = slice(row, row + 1)
        alone, _ = attend(call_of("", inputs[:, own, :, padding:length], []), SELECTORS[1])
        torch.testing.assert_close(output[own, :, padding:], alone, atol=1e-10, rtol=1e-10)
        assert not output[own, :, :padding].any()


def test_a_chunk_over_a_cache_stays_where_it_is() -> None:
    text = KINDS["padding"].text.replace("kv <= q", "kv <= q + 40")
    call = call_of(text, torch.randn(3, 2, 4, 70, 16), tensors([0, 9], 70, 0))
    call = replace(call, query=call.query[:, :, :30])
    assert align(call, SparseConfig(selector=SELECTORS[0], min_length=0), traced=True) is None
