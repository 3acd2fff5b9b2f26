"""Calls that once came out wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.api.models import qkv
from unisparse_flex import UniSparse, attention, create_block_mask, explain, optimize
from unisparse_flex.catching import dispatch_key as dispatch
from unisparse_flex.passes import DenseReason
from unisparse_flex.selectors import FlashPrefill

from .entries import OneCall

SELECTOR = UniSparse(block_size=16, c_q=4, c_k=4, top_k=1, last_query_blocks=0)
Q, K, V = qkv(40, heads=(2, 2))


def optimized() -> Any:
    return optimize(OneCall(), SELECTOR, min_length=0)


def overlapping(heads: int, length: int, width: int) -> Tensor:
    """[1, heads, length, width], each token one number behind the one before it."""
    memory = torch.randn(heads * length + width, generator=torch.Generator().manual_seed(0))
    return memory.as_strided((1, heads, length, width), (heads * length, length, 1, 1))


@pytest.mark.parametrize("mask", [None, torch.ones(0, 1, 40, 40, dtype=torch.bool)])
def test_an_empty_batch_gives_an_empty_output(mask: Tensor | None) -> None:
    empty = Q[:0]
    assert attention(empty, empty, empty, mask, selector=SELECTOR).shape == (0, 2, 40, 16)
    assert optimized()(query=empty, key=empty, value=empty, attn_mask=mask).shape == empty.shape


def test_the_block_mask_of_an_empty_batch_can_be_evaluated() -> None:
    mask = torch.ones(0, 1, 40, 40, dtype=torch.bool)
    block_mask = create_block_mask(Q[:0], K[:0], attn_mask=mask, selector=SELECTOR)
    none, one = torch.arange(0), torch.tensor(0)
    assert block_mask.mask_mod(none, one, one, one).shape == (0,)


@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize("length", [1, 40])
def test_tokens_that_overlap_in_memory_are_read_as_they_stand(length: int, width: int) -> None:
    tokens = overlapping(2, length, width)
    output = attention(tokens, tokens, tokens, selector=SELECTOR)
    apart = tokens.clone(memory_format=torch.contiguous_format)
    assert output.equal(attention(apart, apart, apart, selector=SELECTOR))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_whose_entries_are_all_at_the_minimum_is_zero(dtype: torch.dtype) -> None:
    mask = torch.zeros(40, 40)
    mask[3] = torch.finfo(torch.float32).min
    output = attention(Q.to(dtype), K.to(dtype), V.to(dtype), mask, selector=SELECTOR)
    assert not output[:, :, 3].any()
    assert output[:, :, 4].all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scale": "1"}, TypeError, "scale must be a number or None, got '1'"),
        ({"scale": 10**400}, ValueError, "scale must fit a float, got an int of 1329 bits"),
        ({"is_causal": None}, TypeError, "is_causal must be True or False, got None"),
        ({"selector": 0}, TypeError, "selector must be a selector .*, got 0"),
        ({"selector": "UniSparse"}, TypeError, "selector must be a selector .*, got 'UniSparse'"),
        ({"query": Q.to_sparse()}, TypeError, r"query must be a dense tensor, got layout .*; conv"),
        (
            {"attn_mask": torch.zeros(40, 40).to(torch.float8_e4m3fn)},
            TypeError,
            r"attn_mask must be bool .* got torch.float8_e4m3fn; convert",
        ),
    ],
)
@pytest.mark.parametrize("with_value", [False, True], ids=["create_block_mask", "attention"])
def test_what_is_wrong_is_named(
    changes: dict[str, Any], error: type[Exception], message: str, with_value: bool
) -> None:
    arguments: dict[str, Any] = {"query": Q, "key": K, "selector": SELECTOR, **changes}
    function: Callable[..., Any] = create_block_mask
    if with_value:
        function, arguments["value"] = attention, V
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize("scale", [2, 2**70, -1])
def test_a_scale_may_be_an_int(scale: int) -> None:
    output = attention(Q, K, V, scale=scale, selector=SELECTOR)
    assert output.equal(attention(Q, K, V, scale=float(scale), selector=SELECTOR))


def test_an_optimized_call_without_a_head_dim_is_sdpas() -> None:
    arguments = {"query": Q[..., :0], "key": K[..., :0], "value": V}
    assert optimized()(**arguments).equal(OneCall()(**arguments))


@pytest.mark.parametrize("dropout_p", [-0.5, math.nan])
def test_a_dropout_that_sdpa_refuses_is_refused(dropout_p: float) -> None:
    for model in (OneCall(), optimized()):
        with pytest.raises(RuntimeError):
            model(query=Q, key=K, value=V, dropout_p=dropout_p)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("with_key", [True, False])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_left_to_sdpa(
    layout: torch.layout, with_key: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nested(*tokens: Tensor) -> Tensor:
        if layout is torch.strided:
            return torch.nested.nested_tensor(list(tokens))
        turned = [t.transpose(0, 1) for t in tokens]
        return torch.nested.nested_tensor(turned, layout=layout).transpose(1, 2)

    if not with_key:
        monkeypatch.setattr(dispatch, "_key", None)
    x = nested(Q[0], Q[0, :, :20])
    arguments = {"query": x, "key": x, "value": x}
    with torch.no_grad():
        output, expected = optimized()(**arguments), OneCall()(**arguments)
        (call,) = explain(optimized(), **arguments).calls
    assert call.decision == "dense"
    assert call.reason is DenseReason.NOT_DENSE
    for one, other in zip(output.unbind(), expected.unbind(), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("rule", [{"threshold": 0.6}, {"head_thresholds": (0.6, 0.9)}])
def test_rows_of_which_no_block_reaches_the_threshold_keep_their_highest(
    rule: dict[str, Any],
) -> None:
    few: dict[str, Any] = {"sink_blocks": 0, "last_query_blocks": 0}
    selector = UniSparse(block_size=16, sampled_queries=16, **rule, **few)
    even = K[:, :, :1].expand(-1, -1, 31, -1)
    selection = selector.select(Q, even)
    assert selection.keep.equal(torch.tensor([True, False]).expand(1, 2, 3, 2))
    output = attention(Q, even, V[:, :, :31], selector=selector)
    torch.testing.assert_close(output, V[:, :, :16].mean(2, keepdim=True).expand_as(output))


def test_a_row_whose_scores_are_all_zero_keeps_its_highest() -> None:
    selector = FlashPrefill(
        block_size=16, alpha=0.6, sink_blocks=0, local_blocks=1, last_query_blocks=0
    )
    query, key = torch.ones(1, 1, 17, 4), torch.ones(1, 1, 4, 4)
    query[:, :, 16] = -1
    # The last row's only logit is -inf.
    selection = selector.select(query, key, scale=math.inf)
    assert selection.keep.all()
