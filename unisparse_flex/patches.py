"""`patch_attention`: block-sparse attention over the patches of an image or a video."""

from __future__ import annotations

from torch import Tensor

from .block_masks import PatchOrder, Selector, UniSparse, validate_query_key, validate_value
from .block_masks.selectors import validate_selector
from .functional import attention

# Nothing is generated from the last patch, and the first is no sink.
DEFAULT_PATCH_SELECTOR = UniSparse(sink_blocks=0, last_query_blocks=0)


def patch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    order: PatchOrder,
    selector: Selector | None = None,
    text_rows: bool = True,
    text_keys: bool = True,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Block-sparse self-attention, not causal, over tokens in raster order.

    Brings them into the tile order of ``order``, where a block is a tile, attends to the kept
    blocks (`attention`), and restores the order. A model of many layers may rather keep its tokens
    in tile order throughout: `PatchOrder.permute` behind the patch embedding, and call `attention`
    or `optimize` with `PatchOrder.keep_text`'s selector.

    Args:
        query: [B, Hq, S, D], float16, bfloat16, float32 or float64; S is ``order.num_tokens``.
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        order: Grid, tile and text of the sequence.
        selector: Which blocks are kept; ``UniSparse(sink_blocks=0, last_query_blocks=0)`` by
            default. The volume of the order's tile divides its ``block_size``.
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
    selector = DEFAULT_PATCH_SELECTOR if selector is None else selector
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
