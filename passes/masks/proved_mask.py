"""ProvedMask: a mask as the formula that it provably is, and as arguments of an attention call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...block_masks.masks import (
    KV,
    TRUE,
    Bool,
    Q,
    format_mask,
    is_known,
    number_of,
    offset_bound,
)
from ..calls import SdpaCall, recorded_value


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProvedMask:
    """A mask as a formula, with what the formula reads.

    Attributes:
        expr: The formula.
        tensors: What ``t0, t1, ...`` stand for: nodes of a graph, or tensors.
        numbers: What ``n0, n1, ...`` stand for: nodes of a graph, or integers.
        kind: What it is, in words: ``"causal, key padding"``.
    """

    expr: Bool
    tensors: tuple[Any, ...]
    numbers: tuple[Any, ...]
    kind: str

    @property
    def text(self) -> str:
        """The formula, as `MaskProgram.parse` reads it."""
        return format_mask(self.expr)

    def is_everything(self) -> bool:
        """Whether the mask hides nothing."""
        return self.expr == TRUE

    def causal_flags(self, q_len: int, kv_len: int) -> tuple[bool, bool] | None:
        """SDPA's flags that say the same; ``None`` where the mask is more, or other, than a flag.

        Args:
            q_len: Query rows of the call, perhaps symbolic.
            kv_len: Its keys.

        Returns:
            ``is_causal`` and ``causal_lower_right``, one of them True.
        """
        bound = offset_bound(self.expr, KV, Q)
        if bound is None:
            return None
        offset = number_of(bound, [_recorded(number) for number in self.numbers])
        last = kv_len - q_len
        upper_left = statically_known_true(offset == 0)
        aligned = (
            isinstance(offset, int) and not upper_left and statically_known_true(offset == last)
        )
        lower_right = aligned and is_known(last >= 0)
        if not (upper_left or lower_right):
            return None
        return upper_left, lower_right

    def bind(self, call: SdpaCall, *, q_len: int, kv_len: int) -> SdpaCall:
        """``call`` with this mask in place of a tensor: as flags where they say it all.

        Args:
            call: An attention call without flags, that holds what the mask holds: nodes or values.
            q_len: Its query rows, perhaps symbolic.
            kv_len: Its keys.
        """
        call = replace(call, attn_mask=None)
        if self.is_everything():
            return call
        flags = self.causal_flags(q_len, kv_len)
        if flags is not None:
            is_causal, lower_right = flags
            return replace(call, is_causal=is_causal, causal_lower_right=lower_right)
        return replace(
            call,
            mask=self.text,
            mask_tensors=list(self.tensors),
            mask_numbers=list(self.numbers),
        )


def _recorded(number: Any) -> Any:
    return recorded_value(number) if isinstance(number, fx.Node) else number
