"""The mask function beside `register`'s attention function: transformers' own, not computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..passes.calls import is_tracing
from .deferred_mask import DeferredMask


class _NotSkipped(Exception):
    """sdpa_mask would compute a mask."""


def _ask(*_: Any) -> Any:
    """A mask function in place of the model's: says that it is needed."""
    raise _NotSkipped


def create_mask_function(sdpa_mask: Callable[..., Any], min_queries: int) -> Callable[..., Any]:
    """A mask function for ``ALL_MASK_ATTENTION_FUNCTIONS``.

    Args:
        sdpa_mask: transformers' own. It decides where no mask is needed, and computes those that
            are: all of them while a graph is traced, where the pass reads what they are.
        min_queries: Masks of fewer queries are for dense attention, and computed at once.
    """

    def unisparse_mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor | None:
        if mask_function is not None:
            options["mask_function"] = mask_function
        options.update(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            attention_mask=attention_mask,
        )
        fits = attention_mask is None or (
            attention_mask.dim() == 2 and attention_mask.shape[0] >= batch_size
        )
        # What does not fit is transformers' own error, not one of a formula.
        if is_tracing() or q_length < min_queries or not fits:
            return sdpa_mask(q_offset=q_offset, kv_offset=kv_offset, **options)
        try:
            skip = {**options, "mask_function": _ask}
            return sdpa_mask(q_offset=q_offset, kv_offset=kv_offset, **skip)
        except _NotSkipped:
            pass
        options.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        # 0 stands for no cache: part of the formula. Of a static cache it is a tensor.
        changing = {
            name: offset
            for name, offset in (("q_offset", int(q_offset)), ("kv_offset", int(kv_offset)))
            if offset != 0
        }

        def compute(*numbers: int) -> Tensor:
            offsets = dict(zip(changing, numbers, strict=True))
            return sdpa_mask(**{"q_offset": 0, "kv_offset": 0, **offsets}, **options)

        return DeferredMask(
            compute,
            tuple(changing.values()),
            shape=(batch_size, 1, q_length, kv_length),
            device=options.get("device", "cpu"),
            padding=attention_mask,
        )

    return unisparse_mask
