"""Sparse attention as functions: of SDPA's signature, and over the patches of an image or video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from .block_masks import DEFAULT_SELECTOR, PatchOrder, Selector, UniSparse
from .block_masks.selectors import (
    QUALITIES,
    choose_selector,
    selector_of_quality,
    validate_selector,
)
from .block_masks.validation import (
    validate_attn_mask,
    validate_causality,
    validate_query_key,
    validate_scale,
    validate_value,
)
from .catching import resolve_causal_bias
from .passes import SparseConfig
from .passes.attend import marked_sdpa
from .passes.calls import SdpaCall


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_lower_right: bool = False,
    selector: Selector | None = None,
    quality: str | float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Block-sparse attention with the signature of ``F.scaled_dot_product_attention``.

    Use it in place of SDPA in a model of your own; it is sparse at every length. Within a kept
    block attention is exact, masks included. Under `torch.compile` it becomes a FlexAttention
    kernel; eagerly it runs one on CUDA and masked SDPA on the CPU, over the same blocks.

    A NaN or infinity in ``query`` or ``key`` makes the query blocks that see it dense, so that it
    reaches the output as in SDPA. One in ``value`` reaches it through a kept block; elsewhere it
    may, as what a mask hides may in SDPA.

    Args:
        query: [B, Hq, Sq, D], float16, bfloat16, float32 or float64.
        key: [B, Hkv, Skv, D].
        value: [B, Hkv, Skv, Dv].
        attn_mask: bool (True takes part) or float (added to the logits; an entry at the dtype's
            minimum takes no part, and a row without any other is 0), broadcastable to
            [B, Hq, Sq, Skv]; or one of `torch.nn.attention.bias.causal_lower_right` and
            ``causal_upper_left`` (made outside compiled code: Dynamo cannot trace their
            construction). Not with a causal flag.
        dropout_p: Must be 0.0.
        is_causal: Query row r sees the keys up to r (top-left), as in SDPA.
        scale: Factor on the logits; 1 / sqrt(D) by default.
        enable_gqa: Allows Hkv < Hq; Hkv divides Hq.
        causal_lower_right: Query row r sees the keys up to r + Skv - Sq, so that the last row is
            aligned with the last key, as a chunk of a prompt and decoding with a cache need;
            needs Sq <= Skv, and goes without ``is_causal``.
        selector: Which blocks are kept; `UniSparse()` by default.
        quality: ``"fast"``, ``"balanced"`` or ``"high"`` instead of ``selector``: how much of the
            attention mass the default selector keeps. Or a number: 1 is ``"balanced"``, and larger
            ones keep more blocks (`selectors.selector_of_quality`).
        backend: The kernel on CUDA: ``"flash"`` (FlashAttention-4), ``"triton"``, or ``"auto"``,
            which takes FlashAttention-4 where it is installed and can run the call.

    Returns:
        [B, Hq, Sq, Dv], query's dtype.

    Raises:
        TypeError: Not tensors, or dtypes that differ or are not floating.
        ValueError: Ranks, heads, devices, lengths or masks that do not go together; two of
            ``is_causal``, ``causal_lower_right`` and ``attn_mask``; ``selector`` and ``quality``,
            or no such quality.
        NotImplementedError: ``dropout_p`` > 0, ``causal_lower_right`` with Sq > Skv, or what the
            kernels cannot do.
    """
    validate_query_key(query, key)
    validate_value(key, value)
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(
            "query and key must have the same number of heads unless enable_gqa=True, "
            f"got {query.shape[1]} and {key.shape[1]}"
        )
    validate_scale(scale)
    validate_causality(is_causal, causal_lower_right, attn_mask)
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"dropout_p must be 0.0 (no sparse kernel drops attention weights), got {dropout_p}; "
            "use F.scaled_dot_product_attention where dropout is needed"
        )
    call = resolve_causal_bias(
        SdpaCall(
            query=query,
            key=key,
            value=value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=None if scale is None else float(scale),
            enable_gqa=enable_gqa,
            causal_lower_right=causal_lower_right,
        )
    )
    if call.attn_mask is not None:
        if isinstance(call.attn_mask, CausalBias):
            bias = call.attn_mask
            raise ValueError(
                f"attn_mask, a CausalBias, must be made for q_len {query.shape[2]} and kv_len "
                f"{key.shape[2]}, got {bias.seq_len_q} and {bias.seq_len_kv}"
            )
        validate_attn_mask(call.attn_mask, query, key)
    if quality is None:
        selector = DEFAULT_SELECTOR if selector is None else selector
        return marked_sdpa(call, _encode(selector, backend))
    return marked_sdpa(call, _encode_quality(selector, quality, backend))


def _encode(selector: Selector, backend: str) -> str:
    return SparseConfig(selector=selector, strict=True, backend=backend).encode()


# Dynamo cannot trace the making of a selector, and need not: its text is a constant.
@torch.compiler.assume_constant_result
def _encode_quality(selector: Selector | None, quality: str | float, backend: str) -> str:
    return _encode(choose_selector(selector, quality), backend)


# Nothing is generated from the last patch, and the first is no sink.
PATCHES: dict[str, Any] = {"sink_blocks": 0, "last_query_blocks": 0}
DEFAULT_PATCH_SELECTOR = UniSparse.paper(**PATCHES)
PATCH_QUALITIES = {name: selector_of_quality(name, UniSparse(**PATCHES)) for name in QUALITIES}


def patch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: PatchOrder,
    selector: Selector | None = None,
    quality: str | float | None = None,
    text_rows: bool = True,
    text_keys: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Block-sparse self-attention, not causal, over tokens in raster order.

    Brings them into the tile order of ``order``, where a block is a tile, attends to the kept
    blocks (`attention`), and restores the order. A model of many layers may rather keep its tokens
    in tile order throughout: `PatchOrder.permute` after the patch embedding, and call `attention`
    or `optimize` with `PatchOrder.keep_text`'s selector.

    Args:
        query: [B, Hq, S, D], float16, bfloat16, float32 or float64; S is ``order.num_tokens``.
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        order: Grid, tile and text of the sequence.
        selector: Which blocks are kept; ``UniSparse.paper(sink_blocks=0, last_query_blocks=0)`` by
            default. The volume of the order's tile divides its ``block_size``.
        quality: See `attention`; of ``UniSparse(sink_blocks=0, last_query_blocks=0)``, whose
            thresholds were chosen on text.
        text_rows: Blocks of queries that hold text keep every key.
        text_keys: Blocks of keys that hold text are kept for every query.
        scale: Factor on the logits; 1 / sqrt(D) by default.
        enable_gqa: Allows Hkv < Hq; Hkv divides Hq.
        backend: See `attention`.

    Returns:
        [B, Hq, S, Dv] in raster order, query's dtype.

    Raises:
        TypeError: Not tensors, dtypes that differ or are not floating, or no PatchOrder.
        ValueError: Ranks, heads, devices, lengths or tiles that do not go together.
        NotImplementedError: What the kernels cannot do.
    """
    if not isinstance(order, PatchOrder):
        raise TypeError(
            "order must be a PatchOrder such as PatchOrder(grid=(16, 30, 52), tile=(2, 8, 8)), "
            f"got {order!r} of type {type(order).__name__}"
        )
    if quality is None:
        selector = DEFAULT_PATCH_SELECTOR if selector is None else selector
    elif selector is None and quality in PATCH_QUALITIES:
        # Made before: Dynamo cannot trace the making of a selector.
        selector = PATCH_QUALITIES[quality]
    else:
        selector = choose_selector(selector, quality, UniSparse(**PATCHES))
    validate_selector(selector)
    validate_query_key(query, key)
    validate_value(key, value)
    for name, tensor in (("query", query), ("key", key)):
        if tensor.shape[2] != order.num_tokens:
            raise ValueError(
                f"{name} must hold order's {order.num_tokens} tokens, text and patches, got "
                f"{tensor.shape[2]} (shape {list(tensor.shape)}); make the PatchOrder for this "
                "sequence"
            )
    selector = order.keep_text(selector, rows=text_rows, keys=text_keys)
    query, key, value = (order.permute(tensor, -2) for tensor in (query, key, value))
    output = attention(
        query,
        key,
        value,
        scale=scale,
        enable_gqa=enable_gqa,
        selector=selector,
        backend=backend,
    )
    return order.restore(output, -2)
