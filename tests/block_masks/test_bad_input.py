"""Every refusal names the argument, and is of the right kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from unisparse_flex.block_masks import ForcedBlocks, TopK, TopP, UniSparse, create_block_mask
from unisparse_flex.block_masks.validation import validate_value

SELECTOR = UniSparse(block_size=16, c_q=4, c_k=4)
ENTRIES = (SELECTOR.select, partial(create_block_mask, selector=SELECTOR))


def tokens(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape or (2, 4, 40, 8), **options)


BAD_TENSORS = [
    ({"query": [1.0]}, TypeError, r"query must be a torch\.Tensor, got list"),
    ({"key": None}, TypeError, r"key must be a torch\.Tensor, got NoneType"),
    ({"query": tokens(4, 40, 8)}, ValueError, r"query must be \[batch.*got 3 dimensions"),
    ({"key": tokens(1, 2, 4, 40, 8)}, ValueError, r"key must be \[batch.*got 5 dimensions"),
    ({"query": tokens(2, 3, 40, 8)}, ValueError, r"query heads must be a multiple.*got 3 and 2"),
    ({"key": tokens(2, 8, 40, 8)}, ValueError, r"query heads must be a multiple.*got 4 and 8"),
    ({"key": tokens(2, 0, 40, 8)}, ValueError, r"key"),
    ({"query": tokens(2, 0, 40, 8)}, ValueError, r"query"),
    ({"key": tokens(3, 2, 40, 8)}, ValueError, r"key must have query's batch size 2, got 3"),
    ({"key": tokens(2, 2, 40, 4)}, ValueError, r"key must have query's head_dim 8, got 4"),
    ({"query": tokens(2, 4, 40, 0)}, ValueError, r"query must have a head_dim of at least 1"),
    ({"query": tokens(2, 4, 0, 8)}, ValueError, r"query must hold at least one token"),
    ({"key": tokens(2, 2, 0, 8)}, ValueError, r"key must hold at least one token"),
    ({"query": tokens(dtype=torch.int64)}, TypeError, r"query must be float16.*int64"),
    ({"key": tokens(dtype=torch.int8)}, TypeError, r"key must be float16.*int8"),
    ({"key": tokens(dtype=torch.float64)}, TypeError, r"key must have query's dtype.*float64"),
    ({"key": tokens(device="meta")}, ValueError, r"key must be on query's device cpu, got meta"),
    (
        {"causal_lower_right": True, "key": tokens(2, 2, 39, 8)},
        ValueError,
        "causal_lower_right must have q_len <= kv_len .*, got q_len 40 and kv_len 39; pass .*",
    ),
    (
        {"is_causal": True, "causal_lower_right": True},
        ValueError,
        "is_causal and causal_lower_right must not both be given, got both; keep is_causal where",
    ),
    *[
        ({name: flag}, TypeError, f"{name} must be True or False, got {flag!r} of type")
        for name in ("is_causal", "causal_lower_right")
        for flag in (None, 1, "yes")
    ],
]

BAD_MASKS = [
    (tokens(40, 40, dtype=torch.int64), TypeError, r"attn_mask must be bool.*int64"),
    (tokens(40, 40, dtype=torch.complex64), TypeError, r"attn_mask must be bool.*complex64"),
    (tokens(40, 41).bool(), ValueError, r"attn_mask must broadcast to .*\[2, 4, 40, 40\]"),
    (tokens(3, 1, 1, 40).bool(), ValueError, r"attn_mask must broadcast"),
    (tokens(2, 2, 40, 40).bool(), ValueError, r"attn_mask must broadcast"),
    (tokens(1, 2, 4, 40, 40).bool(), ValueError, r"attn_mask must broadcast"),
    (tokens(40, 40, device="meta").bool(), ValueError, r"attn_mask must be on query's device cpu"),
    ([[True]], TypeError, r"attn_mask"),
]

BAD_FIELDS = [
    *[({"block_size": size}, ValueError, "block_size must be") for size in (0, -16, 8, 48, 100)],
    *[({"block_size": size}, TypeError, "block_size must be an int") for size in (16.0, True, "9")],
    *[({"top_p": p}, ValueError, r"top_p must be in \(0, 1\]") for p in (0, -0.1, 1.01, 2)],
    ({"top_p": float("nan")}, ValueError, r"top_p must be in \(0, 1\], got nan"),
    *[({"top_p": p}, TypeError, "top_p must be a number") for p in (True, "0.9", [0.9])],
    *[({"top_k": k}, ValueError, "top_k must be at least 1") for k in (0, -1)],
    *[({"top_k": k}, TypeError, "top_k must be an int") for k in (True, 2.0, "2")],
    (
        {"top_p": 0.9, "top_k": 2},
        ValueError,
        "top_k must not be given with top_p or threshold",
    ),
    (
        {"threshold": 0.1, "top_k": 2},
        ValueError,
        "must not be given with top_p or threshold, got top_k=2 and threshold=0.1; leave it None",
    ),
    (
        {"top_p": 0.9, "top_k": 2, "threshold": 0.1},
        ValueError,
        "got top_p=0.9 and top_k=2 and threshold=0.1",
    ),
    *[({"threshold": t}, ValueError, r"threshold must be in \(0, 1\]") for t in (0, -0.1, 1.01)],
    *[({"head_thresholds": (0.1, t)}, ValueError, r"thresholds\[1\] must be in") for t in (-1, 2)],
    *[({"head_thresholds": (t,)}, TypeError, r"\[0\] must be a number") for t in (False, "0.1")],
    ({"head_thresholds": ()}, TypeError, "head_thresholds must be a tuple"),
    ({"head_thresholds": [0.1]}, TypeError, "head_thresholds must be a tuple"),
    ({"head_thresholds": (0.1,), "threshold": 0.1}, ValueError, "got threshold=0.1 and c_h=1"),
    ({"head_thresholds": (0.1,), "c_h": 2}, ValueError, "got threshold=None and c_h=2"),
    ({"head_thresholds": (0.1,), "top_k": 2}, ValueError, "top_k must not be given"),
    ({"threshold": float("nan")}, ValueError, r"threshold must be in \(0, 1\], got nan"),
    *[({"threshold": t}, TypeError, "threshold must be a number") for t in (True, "0.1")],
    ({"threshold_blocks": 64}, ValueError, "must be given with threshold .*, got 64 alone"),
    ({"threshold_blocks": 64, "top_p": 0.9}, ValueError, "threshold_blocks must be given with"),
    *[
        ({"threshold": 0.1, "threshold_blocks": n}, error, f"threshold_blocks must be {rule}")
        for n, error, rule in ((0, ValueError, "at least 1"), (6.5, TypeError, "an int"))
    ],
    *[
        ({"sampled_queries": n}, ValueError, f"sampled_queries must divide block_size 128, got {n}")
        for n in (3, 48, 256)
    ],
    ({"sampled_queries": -1}, ValueError, "sampled_queries must be at least 0"),
    *[
        ({"sampled_queries": n}, TypeError, "sampled_queries must be an int")
        for n in (True, 4.0, None)
    ],
    *[({name: 0}, ValueError, f"{name} must be at least 1") for name in ("c_q", "c_k", "c_h")],
    *[({name: 2.0}, TypeError, f"{name} must be an int") for name in ("c_q", "c_k", "c_h")],
    *[({name: 3}, ValueError, f"{name} must divide block_size 128") for name in ("c_q", "c_k")],
    *[({name: 256}, ValueError, f"{name} must divide block_size") for name in ("c_q", "c_k")],
    ({"sink_blocks": -1}, ValueError, "sink_blocks must be at least 0"),
    ({"local_blocks": 0}, ValueError, "local_blocks must be at least 1"),
    ({"last_query_blocks": -1}, ValueError, "last_query_blocks must be at least 0"),
    ({"sink_blocks": 1.0}, TypeError, "sink_blocks must be an int"),
    ({"local_blocks": None}, TypeError, "local_blocks must be an int"),
    ({"last_query_blocks": True}, TypeError, "last_query_blocks must be an int"),
]


@pytest.mark.parametrize("function", ENTRIES, ids=["select", "create_block_mask"])
@pytest.mark.parametrize(("changes", "error", "message"), BAD_TENSORS)
def test_bad_tensors_are_named(
    function: Callable[..., Any], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"query": tokens(), "key": tokens(2, 2, 40, 8), **changes}
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize("function", ENTRIES, ids=["select", "create_block_mask"])
@pytest.mark.parametrize(("attn_mask", "error", "message"), BAD_MASKS)
def test_bad_masks_are_named(
    function: Callable[..., Any], attn_mask: Any, error: type[Exception], message: str
) -> None:
    arguments = {"query": tokens(), "key": tokens(2, 2, 40, 8), "attn_mask": attn_mask}
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize(("fields", "error", "message"), BAD_FIELDS)
def test_bad_fields_of_a_selector_are_named(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        UniSparse(**fields)


@pytest.mark.parametrize("flag", ["is_causal", "causal_lower_right"])
def test_a_mask_beside_a_causal_flag_is_refused(flag: str) -> None:
    options: dict[str, Any] = {"attn_mask": torch.ones(40, 40, dtype=torch.bool), flag: True}
    with pytest.raises(ValueError, match=f"attn_mask and {flag} must not both be given"):
        SELECTOR.select(tokens(), tokens(2, 2, 40, 8), **options)


def test_a_block_mask_takes_no_float_mask() -> None:
    with pytest.raises(TypeError, match=r"attn_mask must be bool here, got torch\.float32"):
        create_block_mask(tokens(), tokens(2, 2, 40, 8), attn_mask=tokens(40, 40))


@pytest.mark.parametrize("c_h", [3, 4, 8])
def test_composite_heads_that_do_not_divide_the_group_are_refused(c_h: int) -> None:
    selector = UniSparse(block_size=16, c_h=c_h)
    with pytest.raises(ValueError, match=f"c_h must divide the GQA group of 2 heads.*got {c_h}"):
        selector.select(tokens(), tokens(2, 2, 40, 8))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (tokens(2, 40, 8), ValueError, r"value must be \[batch"),
        (3.0, TypeError, r"value must be a torch\.Tensor"),
        (tokens(2, 4, 40, 8), ValueError, "value must have key's heads and tokens"),
        (tokens(2, 2, 41, 8), ValueError, "value must have key's heads and tokens"),
        (tokens(1, 2, 40, 8), ValueError, "value must have key's batch size"),
        (tokens(2, 2, 40, 8, dtype=torch.float64), TypeError, "value must have key's dtype"),
        (tokens(2, 2, 40, 8, device="meta"), ValueError, "value must be on key's device cpu"),
    ],
)
def test_bad_values_are_named(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        validate_value(tokens(2, 2, 40, 8), value)


def test_values_may_have_another_head_dim() -> None:
    validate_value(tokens(2, 2, 40, 8), tokens(2, 2, 40, 5))


def test_rules_and_guards_check_themselves() -> None:
    with pytest.raises(ValueError, match="top_p"):
        TopP(top_p=0.0)
    with pytest.raises(ValueError, match="top_k"):
        TopK(top_k=0)
    with pytest.raises(ValueError, match="local_blocks"):
        ForcedBlocks(local_blocks=0)


def test_an_empty_batch_selects_nothing() -> None:
    selection = SELECTOR.select(tokens(0, 4, 40, 8), tokens(0, 2, 40, 8))
    assert selection.keep.shape == (0, 4, 3, 3)
