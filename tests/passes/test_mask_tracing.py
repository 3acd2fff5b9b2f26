"""Masks that functions compute: proved without computing them, equal where they are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils
from transformers.masking_utils import sdpa_mask

from unisparse_flex.block_masks.masks import MaskProgram
from unisparse_flex.passes.masks import ProvedMask, Unproved, trace_mask

Compute = Callable[..., Tensor]
LENGTH = 61


def program(traced: ProvedMask, batch: int, q_len: int, kv_len: int) -> MaskProgram:
    return MaskProgram.parse(
        traced.text,
        tensors=traced.tensors,
        numbers=traced.numbers,
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
    )


def assert_proves(
    compute: Compute, numbers: tuple[int, ...], shape: tuple[int, int, int]
) -> ProvedMask:
    """Asserts that the formula says what ``compute`` computes; [B, Sq, Skv]."""
    batch, q_len, kv_len = shape
    traced = trace_mask(compute, numbers, (batch, 4, q_len, kv_len))
    assert isinstance(traced, ProvedMask), traced
    expected = compute(*numbers).expand(batch, 1, q_len, kv_len)
    pairs = program(traced, *shape).pairs(torch.arange(q_len), torch.arange(kv_len))
    assert pairs.expand_as(expected).equal(expected)
    return traced


def of_transformers(function: Any, **options: Any) -> Compute:
    def compute(q_offset: int = 0, kv_offset: int = 0) -> Tensor:
        return sdpa_mask(
            mask_function=function,
            q_offset=q_offset,
            kv_offset=kv_offset,
            allow_is_causal_skip=False,
            **options,
        )

    return compute


def padding(length: int, *padded: int) -> Tensor:
    """bool [B, S], so many tokens of padding on the left of each row."""
    return torch.arange(length) >= torch.tensor(padded)[:, None]


def packed() -> Any:
    positions = torch.cat((torch.arange(20), torch.arange(LENGTH - 20)))[None].expand(2, -1)
    documents = masking_utils.find_packed_sequence_indices(positions)
    return masking_utils.and_masks(
        masking_utils.causal_mask_function, masking_utils.packed_sequence_mask_function(documents)
    )


def images() -> Any:
    """Tokens of an image see each other both ways."""
    image = torch.full((2, LENGTH), -1)
    image[:, 10:30], image[1, 40:50] = 0, 1

    def of_one_image(b: Any, _: Any, q: Any, kv: Any) -> Any:
        return (image[b, q] == image[b, kv]) & (image[b, q] >= 0)

    return masking_utils.or_masks(masking_utils.causal_mask_function, of_one_image)


CASES = {
    "causal": (masking_utils.causal_mask_function, "causal"),
    "sliding": (masking_utils.sliding_window_causal_mask_function(8), "causal, sliding window 8"),
    "two-sided": (
        masking_utils.sliding_window_bidirectional_mask_function(8),
        "causal, sliding window 17",
    ),
    "chunks": (
        masking_utils.chunked_causal_mask_function(16, torch.tensor([0, 9])),
        "causal, document",
    ),
    "packed": (packed(), "causal, document"),
    "images": (images(), "other"),
}


@pytest.mark.parametrize("use_vmap", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_transformers_would_compute_is_proved(case: str, padded: bool, use_vmap: bool) -> None:
    function, kind = CASES[case]
    compute = of_transformers(
        function,
        batch_size=2,
        q_length=LENGTH,
        kv_length=LENGTH,
        attention_mask=padding(LENGTH, 0, 9) if padded else None,
        use_vmap=use_vmap,
    )
    traced = assert_proves(compute, (), (2, LENGTH, LENGTH))
    assert traced.kind == (f"{kind}, key padding" if padded else kind)


def test_what_hides_nothing_is_everything() -> None:
    compute = of_transformers(
        masking_utils.bidirectional_mask_function, batch_size=1, q_length=9, kv_length=9
    )
    assert assert_proves(compute, (), (1, 9, 9)).is_everything()


@settings(max_examples=25, deadline=None)
@given(
    q_len=st.sampled_from([1, 2, 17, 63, 127, 129]),
    seen=st.sampled_from([1, 5, 64, 200]),
    behind=st.sampled_from([0, 3, 50]),
    window=st.sampled_from([None, 1, 16, 100]),
    padded=st.booleans(),
)
def test_offsets_of_a_cache_are_numbers_of_the_formula(
    q_len: int, seen: int, behind: int, window: int | None, padded: bool
) -> None:
    """Prefill behind ``seen`` tokens, of a cache that is longer or has dropped the first ones."""
    function = (
        masking_utils.causal_mask_function
        if window is None
        else masking_utils.sliding_window_causal_mask_function(window)
    )
    kv_offset = min(behind, seen)
    kv_len = seen + q_len - kv_offset

    def options(batch: int) -> dict[str, Any]:
        mask = padding(seen + q_len, *range(batch)) if padded else None
        return {"batch_size": batch, "q_length": q_len, "attention_mask": mask}

    compute = of_transformers(function, kv_length=kv_len, **options(2))
    numbers = (seen, kv_offset)
    traced = assert_proves(compute, numbers, (2, q_len, kv_len))
    assert set(traced.numbers) <= set(numbers)


def test_masks_that_differ_in_their_numbers_have_one_text() -> None:
    texts = set()
    for seen in (20, 21, 64):
        compute = of_transformers(
            masking_utils.sliding_window_causal_mask_function(8),
            batch_size=1,
            q_length=40,
            kv_length=40 + seen,
        )
        traced = assert_proves(compute, (seen, 0), (1, 40, 40 + seen))
        assert traced.numbers[0] == seen
        texts.add(traced.text)
    assert len(texts) == 1


class _LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (list, tuple)) else [output]:
            fake = type(tensor) is not Tensor
            if isinstance(tensor, Tensor) and not fake:
                self.elements = max(self.elements, tensor.numel())
        return output


def test_no_tensor_of_pairs_is_made() -> None:
    length = 4096
    compute = of_transformers(
        masking_utils.causal_mask_function,
        batch_size=2,
        q_length=length,
        kv_length=length,
        attention_mask=padding(length, 0, 9),
    )
    with _LargestTensor() as largest:
        assert isinstance(trace_mask(compute, (), (2, 4, length, length)), ProvedMask)
    assert 0 < largest.elements <= 2 * length


def test_what_the_formula_reads_is_a_copy() -> None:
    mask = padding(LENGTH, 0, 9)
    compute = of_transformers(
        masking_utils.causal_mask_function,
        batch_size=2,
        q_length=LENGTH,
        kv_length=LENGTH,
        attention_mask=mask,
    )
    expected = compute()
    traced = trace_mask(compute, (), (2, 4, LENGTH, LENGTH))
    assert isinstance(traced, ProvedMask)
    mask.fill_(True)
    tokens = torch.arange(LENGTH)
    assert program(traced, 2, LENGTH, LENGTH).pairs(tokens, tokens).equal(expected)


def test_a_mask_of_arbitrary_pairs_is_not_proved() -> None:
    pairs = torch.rand(LENGTH, LENGTH) < 0.5
    traced = trace_mask(lambda: pairs[None, None] & pairs.T, (), (1, 4, LENGTH, LENGTH))
    assert traced is Unproved.PAIRS


def test_a_mask_that_differs_between_heads_is_not_proved() -> None:
    heads = torch.arange(4)[None, :, None, None]
    traced = trace_mask(lambda: torch.arange(LENGTH) * 2 <= heads * 20, (), (1, 4, LENGTH, LENGTH))
    assert traced in (Unproved.HEADS, Unproved.PAIRS)


@pytest.mark.parametrize("what", ["reads values", "raises", "returns nothing"])
def test_what_cannot_be_traced_is_not_proved(what: str) -> None:
    def compute(length: int) -> Any:
        tokens = torch.arange(length)
        if what == "raises":
            raise RuntimeError("no mask")
        if what == "returns nothing":
            return None
        return tokens <= int(tokens.sum())

    assert trace_mask(compute, (LENGTH,), (1, 4, LENGTH, LENGTH)) is Unproved.UNTRACED
