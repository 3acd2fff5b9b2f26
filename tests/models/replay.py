"""The float64 oracle: the model as it was, each attention call over the blocks that were selected.

Blocks are selected again, by the selector alone, from the queries and keys that reached the
library in float32: in float64 two nearly equal blocks could change places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.api.reference import attend, select, visible
from unisparse_flex import Selector
from unisparse_flex.passes import SparseConfig, observe_calls
from unisparse_flex.passes.attend.alignment import AlignedCall
from unisparse_flex.passes.calls.sdpa import SdpaCall
from unisparse_flex.selectors import BlockSelection


@dataclass(frozen=True, kw_only=True, slots=True)
class Attended:
    """One attention call as the library saw it; ``selection`` is ``None`` where it stayed dense."""

    call: SdpaCall
    selection: BlockSelection | None


def recorded(run: Callable[[], Tensor]) -> tuple[Tensor, list[Attended]]:
    """What ``run`` returns, and the attention calls that an optimized model made in it."""
    calls: list[Attended] = []

    def observe(
        call: SdpaCall, _: SparseConfig | None, selection: BlockSelection | None, *_reason: Any
    ) -> None:
        # A cache may change in place afterwards.
        calls.append(Attended(call=call.map_tensors(Tensor.clone), selection=selection))

    with observe_calls(observe):
        return run(), calls


class Replay(TorchFunctionMode):
    """Runs the attention calls of an untouched model by definition, over the recorded blocks."""

    def __init__(self, calls: list[Attended], selector: Selector) -> None:
        super().__init__()
        self.left = list(reversed(calls))
        self.selector = selector

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.multi_head_attention_forward:
            # Inside it no mode sees the attention call.
            with mock.patch.object(F, "scaled_dot_product_attention", self._sdpa):
                return func(*args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._sdpa(*args, **(kwargs or {}))

    def _sdpa(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._attend(SdpaCall.bind(args, kwargs), self.left.pop())

    def _attend(self, call: SdpaCall, seen: Attended) -> Tensor:
        mask, seen_mask = call.attn_mask, seen.call.attn_mask
        if seen.selection is not None:
            assert sees(call).equal(in_given_order(sees(seen.call), seen.call))
            selection = seen.selection
            if not seen.call.mask:
                selection = select(
                    self.selector,
                    seen.call.query,
                    seen.call.key,
                    offset=seen.call.causal_offset(),
                    attn_mask=seen_mask,
                    scale=call.scale,
                )
                assert selection.keep.equal(seen.selection.keep)
            kept = in_given_order(selection.token_mask(), seen.call)
            if mask is None or mask.dtype is torch.bool:
                mask = kept if mask is None else mask & kept
            else:
                mask = mask.masked_fill(~kept, -torch.inf)
        return attend(
            call.query,
            call.key,
            call.value,
            offset=call.causal_offset(),
            attn_mask=mask,
            scale=call.scale,
            dtype=call.query.dtype,
        )


def sees(call: SdpaCall) -> Tensor:
    """Which keys each query may see, however the call says it: bool [B, Hq, Sq, Skv]."""
    batch, heads, q_len = call.query.shape[:3]
    kv_len = call.key.shape[2]
    pairs = visible(q_len, kv_len, call.causal_offset()).expand(batch, heads, q_len, kv_len)
    mask, program = call.attn_mask, call.mask_program()
    if program is not None:
        mask = program.pairs(torch.arange(q_len), torch.arange(kv_len))
    if mask is None:
        return pairs
    return pairs & (mask if mask.dtype is torch.bool else mask > torch.finfo(mask.dtype).min)


def in_given_order(pairs: Tensor, call: SdpaCall) -> Tensor:
    """bool [B, 1 or Hq, Sq, Skv] of a call's pairs, as who made the call counts tokens."""
    if not isinstance(call, AlignedCall):
        return pairs
    rows = zip(pairs, call.shift.tolist(), strict=True)
    return torch.stack([row.roll((shift, shift), dims=(1, 2)) for row, shift in rows])


def replayed(run: Callable[[], Tensor], calls: list[Attended], selector: Selector) -> Tensor:
    """What ``run`` returns where each attention call is made by definition."""
    mode = Replay(calls, selector)
    with mode:
        output = run()
    assert not mode.left
    return output
