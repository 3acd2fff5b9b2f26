"""The public API's entries: each runs a case and asserts what it returns or raises.

Symbols: B batch, Hq heads, Nq/Nk blocks, Sq/Skv tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from tests.api import reference
from unisparse_flex import UniSparse, attention, create_block_mask, optimize
from unisparse_flex.passes import DenseReason, observe_calls
from unisparse_flex.selectors import BlockSelection, FlashPrefill, Oracle, XAttention

from .cases import Case
from .faults import FAULTS
from .judge import assert_documented, assert_expected, expect, same

# Selectors that look at every query and key.
BY_SCORES = (UniSparse, XAttention, FlashPrefill, Oracle)


def check_attention(case: Case) -> str:
    """`attention`; says what came of it."""
    arguments = {"selector": case.selector, **case.arguments()}
    if case.fault is not None:
        return _refused(case, attention, arguments)
    if _has_rows_without_keys(case):
        with pytest.raises(NotImplementedError, match="causal_lower_right with more queries than"):
            attention(**arguments)
        return "refused: rows without keys"
    if not _supports(case):
        with pytest.raises(NotImplementedError, match="cannot run this call: the selector is not"):
            attention(**arguments)
        return "refused: selector"
    output = attention(**arguments)
    _assert_attention(case, output)
    assert same(output, attention(**arguments))
    return "computed"


def check_select(case: Case) -> str:
    """`Selector.select`; says what came of it."""
    return _check_selecting(case, case.selector.select, _assert_selection)


def check_block_mask(case: Case) -> str:
    """`create_block_mask`; says what came of it."""

    def create(**arguments: Any) -> Any:
        return create_block_mask(**{"selector": case.selector, **arguments})

    mask = case.arguments()["attn_mask"]
    if mask is not None and mask.is_floating_point():
        if case.fault is not None:
            return check_block_mask(replace(case, mask=None))
        with pytest.raises(TypeError, match=r"attn_mask must be bool here, got .*; add it in"):
            create(**_for_selector(case.arguments()))
        return "refused: float mask"
    return _check_selecting(case, create, _assert_block_mask)


def check_optimize(case: Case) -> str:
    """A module of one SDPA call, optimized: SDPA over the blocks, or what SDPA itself does."""
    # SDPA has no such argument.
    case = replace(case, causal_lower_right=False)
    arguments = case.arguments()
    arguments.pop("causal_lower_right")
    if case.fault is not None:
        FAULTS[case.fault].change(arguments, case)
        if "selector" in arguments:
            with pytest.raises(TypeError, match="selector must be a selector"):
                optimize(OneCall(), arguments["selector"])
            return "refused: " + case.fault
        if not FAULTS[case.fault].in_sdpa:
            return "left out: undefined in SDPA"
    plain, reasons = OneCall(), list[DenseReason | None]()
    model = optimize(OneCall(), case.selector, min_length=0)
    with observe_calls(lambda call, config, selection, reason: reasons.append(reason)):
        watched = outcome(model, arguments)
    output = outcome(model, arguments)
    assert type(output) is type(watched)
    if isinstance(output, Exception):
        assert type(outcome(plain, arguments)) is type(output)
        return "raises as SDPA does"
    if reasons != [None] and overlaps(arguments):
        return "dense: undefined in SDPA"
    assert same(output, watched)
    if reasons == [None]:
        assert case.fault is None or isinstance(outcome(plain, arguments), Exception)
        _assert_attention(case, output)
        return "computed"
    assert same(output, outcome(plain, arguments))
    return "dense"


Entry = Callable[[Case], str]
ENTRIES: dict[str, Entry] = {
    "attention": check_attention,
    "select": check_select,
    "create_block_mask": check_block_mask,
    "optimize": check_optimize,
}


class OneCall(nn.Module):
    """A model that is one attention call."""

    def forward(self, **arguments: Any) -> Tensor:
        query, key, value = (arguments.pop(name) for name in ("query", "key", "value"))
        return F.scaled_dot_product_attention(query, key, value, **arguments)


def outcome(model: nn.Module, arguments: dict[str, Any]) -> Any:
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return model(**arguments)
    except Exception as error:
        return error


def _refused(case: Case, function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    assert case.fault is not None
    fault = FAULTS[case.fault]
    fault.change(arguments, case)
    with pytest.raises(fault.error) as raised:
        function(**arguments)
    assert_documented(raised.value, fault.error, fault.message)
    return "refused: " + case.fault


def overlaps(arguments: dict[str, Any]) -> bool:
    """Whether SDPA on the CPU returns memory that nobody wrote: tokens that overlap."""
    tensors = (arguments[name] for name in ("query", "key", "value"))
    return any(t.dim() == 4 and t.stride(2) < t.shape[3] for t in tensors)


def _has_rows_without_keys(case: Case) -> bool:
    return case.causal_lower_right and case.q_len > case.kv_len


def _supports(case: Case) -> bool:
    supported: bool = case.selector.supports(
        causal=case.offset is not None,
        masked=case.mask is not None,
        self_attention=case.q_len == case.kv_len,
    )
    return supported


def _for_selector(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in arguments.items() if n not in ("value", "enable_gqa", "dropout_p")}


def _check_selecting(
    case: Case, function: Callable[..., Any], judge: Callable[[Case, Any], None]
) -> str:
    arguments = _for_selector(case.arguments())
    if case.fault is not None and FAULTS[case.fault].everywhere:
        if case.fault.startswith("selector") and function == case.selector.select:
            return "left out: no argument"
        wrong = case.arguments()
        FAULTS[case.fault].change(wrong, case)
        return _refused(case, lambda **_: function(**_for_selector(wrong)), arguments)
    if _has_rows_without_keys(case):
        with pytest.raises(ValueError, match=r"must have q_len <= kv_len .* got .*; pass"):
            function(**arguments)
        return "refused: rows without keys"
    if not _supports(case):
        with pytest.raises(ValueError, match=r"(needs|must) .* got"):
            function(**arguments)
        return "refused: selector"
    judge(case, function(**arguments))
    return "computed"


def _assert_attention(case: Case, output: Tensor) -> None:
    arguments = case.arguments()
    query, key, mask = (arguments[name] for name in ("query", "key", "attn_mask"))
    scale = None if case.scale is None else float(case.scale)
    selection = reference.select(
        case.selector, query, key, offset=case.offset, attn_mask=_mask_4d(mask), scale=scale
    )
    expected = expect(
        query, key, arguments["value"], selection.token_mask(), attn_mask=mask, scale=scale
    )
    assert_expected(output, expected, case.dtype)


def _mask_4d(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[(None,) * (4 - mask.dim())]


def _seen(case: Case) -> Tensor:
    """bool [B, Hq, Sq, Skv]: what dense attention reads."""
    pairs = reference.visible(case.q_len, case.kv_len, case.offset)
    mask = case.arguments()["attn_mask"]
    if mask is not None:
        hidden = ~mask if mask.dtype is torch.bool else mask <= torch.finfo(mask.dtype).min
        pairs = pairs & ~hidden
    return pairs.expand(case.batch, case.q_heads, -1, -1)


def _blocks(pairs: Tensor, size: int) -> Tensor:
    """bool [B, Hq, Nq, Nk]: blocks that hold a pair."""
    rows, keys = pairs.shape[-2:]
    padded = F.pad(pairs, (0, -keys % size, 0, -rows % size))
    return padded.unflatten(3, (-1, size)).unflatten(2, (-1, size)).any(-1).any(3)


def _assert_selection(case: Case, selection: BlockSelection) -> None:
    size, pairs = case.selector.block_size, _seen(case)
    keep, visible = torch.broadcast_tensors(selection.keep, selection.visible)
    keep, visible = (t.expand(-1, case.q_heads, -1, -1) for t in (keep, visible))
    assert selection.keep.dtype is torch.bool
    assert visible.equal(_blocks(pairs, size))
    assert not (keep & ~visible).any()
    # What a row sees it keeps a part of, and all of where a query or key is not finite.
    kept_pairs = pairs & selection.token_mask()
    assert kept_pairs.any(-1).equal(pairs.any(-1))
    arguments = case.arguments()
    query, key = arguments["query"], arguments["key"]
    if isinstance(case.selector, BY_SCORES):
        bad_pairs = ~query.isfinite().all(-1)[..., None]
        bad_pairs = bad_pairs | ~key.isfinite().all(-1).repeat_interleave(case.group, 1)[:, :, None]
        bad_rows = _blocks(bad_pairs & pairs, size).any(-1)
        assert ((keep == visible).all(-1) | ~bad_rows).all()
    again = case.selector.select(**_for_selector(case.arguments()))
    assert again.keep.equal(selection.keep)


def _assert_block_mask(case: Case, mask: BlockMask) -> None:
    arguments = _for_selector(case.arguments())
    selection = case.selector.select(**arguments)
    rows, keys = torch.arange(case.q_len), torch.arange(case.kv_len)
    batches, heads = torch.arange(case.batch), torch.arange(case.q_heads)
    found = mask.mask_mod(
        batches[:, None, None, None], heads[:, None, None], rows[:, None], keys[None]
    )
    pairs = selection.token_mask() & _seen(case)
    assert found.expand_as(pairs).equal(pairs)
    # Every block in one list at most; full ones wholly seen, and nothing kept left out.
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    partial = _listed(mask.kv_num_blocks, mask.kv_indices)
    full = _listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & full).any()
    kept = selection.keep.expand_as(partial)
    assert (partial | full).equal(kept)
    size = case.selector.block_size
    assert not (full & _blocks(~pairs, size)).any()
    assert mask.shape[-2:] == (case.q_len, case.kv_len)


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    """bool [B, Hq or 1, Nq, Nk]: the blocks of one list."""
    rank = torch.arange(indices.shape[-1])
    chosen = (rank < counts[..., None]).expand_as(indices)
    return torch.zeros_like(chosen).scatter(-1, indices.long(), chosen)
