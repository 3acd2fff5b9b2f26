"""`context_parallel_attention`: block-sparse attention over a sequence that ranks share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..block_masks import DEFAULT_SELECTOR, Selector
from ..block_masks.validation import validate_causality, validate_query_key, validate_value
from ..passes import SparseConfig
from ..passes.attend import context_sdpa
from ..passes.calls import SdpaCall
from .context import ContextParallel


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    context: ContextParallel,
    selector: Selector | None = None,
    is_causal: bool = False,
    causal_lower_right: bool = False,
    scale: float | None = None,
    pieces: Sequence[int] = (),
    backend: str = "auto",
) -> Tensor:
    """Block-sparse prefill attention of this rank's query rows to the keys of all ranks.

    A collective: every rank of the context calls it, with the tokens that `ContextParallel.shard`
    gives it. The blocks are those that one process would keep. Under `torch.compile` it is one
    operator of the graph, without a graph break; what it exchanges depends on the data.

    Args:
        query: [B, Hq, Sq / R, D], float16, bfloat16, float32 or float64; the rank's rows.
        key: [B, Hkv, Skv / R, D]; Hkv divides Hq.
        value: [B, Hkv, Skv / R, Dv].
        context: The ranks.
        selector: Which blocks are kept; `DEFAULT_SELECTOR` by default. What a block of rows keeps
            must not depend on other rows (`Selector.row_independent`).
        is_causal: Row r of the whole sequence sees the keys up to r (top-left), as in SDPA.
        causal_lower_right: Row r of the whole sequence sees the keys up to r + Skv - Sq, so that
            the last row is aligned with the last key, as a prompt with a cache needs; needs
            Sq <= Skv, and goes without ``is_causal``.
        scale: Factor on the logits; 1 / sqrt(D) by default.
        pieces: Tokens of each piece of the keys, where they were shared out piece by piece (a
            cache that grew by several prompts); one piece by default.
        backend: See `unisparse_flex.attention`.

    Returns:
        [B, Hq, Sq / R, Dv], query's dtype.

    Raises:
        TypeError: Not tensors, or dtypes that differ or are not floating.
        ValueError: Ranks, heads, devices or lengths that do not go together; both ``is_causal``
            and ``causal_lower_right``; ranks of the context that differ in what they call, which
            all ranks then raise.
        NotImplementedError: A gradient is needed, the selector needs all rows, or
            ``causal_lower_right`` with Sq > Skv.
        RuntimeError: Another rank is gone.
    """
    validate_query_key(query, key)
    validate_value(key, value)
    validate_causality(is_causal, causal_lower_right)
    if not isinstance(context, ContextParallel):
        raise TypeError(
            f"context must be a ContextParallel, got {context!r} of type {type(context).__name__}"
        )
    call = SdpaCall(
        query=query,
        key=key,
        value=value,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=True,
        causal_lower_right=causal_lower_right,
    )
    config = SparseConfig(
        selector=DEFAULT_SELECTOR if selector is None else selector,
        strict=True,
        backend=backend,
        context=context.name,
    )
    return context_sdpa(call, config, tuple(pieces))
