"""Attention of one row of each sequence to the keys that are listed for it.

FlexAttention's decoding kernel reads units of keys where they lie. The query heads of a key head
are its rows, so that each key head has a list of its own. Nothing waits for the device.

Symbols: B sequences, Hq/Hkv heads, G query heads of a key head, S places for keys, U keys of a
unit, n units, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ...block_masks import fix_strides

# Rows that the decoding kernel takes are fewer.
ROWS = 128
# Bytes of keys and values that it reads at a time, for how many of these it asks before, and the
# fewest keys of a product.
TILE_BYTES, STAGES, WARPS, LEAST = 2**15, 3, 2, 16


def attend_listed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    units: Tensor,
    lengths: Tensor,
    mask: Tensor | None = None,
    *,
    unit: int,
    scale: float,
) -> Tensor:
    """Attends to listed units, by a compiled kernel; inside a graph as a part of it.

    Args:
        query: [B, Hq, D].
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        counts: int32 [B, Hkv], the keys that are read.
        units: int32 [B, Hkv, n], the units in which they lie, `choose_rows`.
        lengths: int32 [B], keys of each sequence.
        mask: bool [1 or B, S], keys that may be read; ``None`` for all.
        unit: U, a power of two.
        scale: Factor on the logits.

    Returns:
        [B, Hq, Dv].

    Raises:
        NotImplementedError: More query heads to a key head than the kernel takes.
    """
    group = query.shape[1] // key.shape[1]
    if group >= ROWS:
        raise NotImplementedError(
            f"query must have fewer than {ROWS} heads to each of key's for sparse decoding, got "
            f"{group}; use transformers' StaticCache"
        )
    if torch.compiler.is_compiling():
        return _attend(query, key, value, counts, units, lengths, mask, unit, scale)
    shapes = *(tuple(t.shape) for t in (query, key, value)), mask is None or len(mask)
    run = _compiled(unit, scale, shapes, query.dtype, query.device)
    return run(query, key, value, counts, units, lengths, mask)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    units: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    unit: int,
    scale: float,
) -> Tensor:
    heads, places = key.shape[1:3]
    rows = query.unflatten(1, (heads, -1))
    if rows.device.type == "cpu":
        # Its kernel takes no view, nor what is computed in its graph.
        rows, units, lengths = fix_strides([rows, units, lengths])
        mask = None if mask is None else fix_strides([mask])[0]
    alike = mask is not None and len(mask) == 1

    def sees(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        held = kv_idx < lengths[b]
        return held if mask is None else held & mask[b * 0 if alike else b, kv_idx]

    listed = BlockMask.from_kv_blocks(
        (counts[..., None] + (unit - 1)) // unit,
        units[:, :, None],
        BLOCK_SIZE=(ROWS, unit),
        mask_mod=sees,
        seq_lengths=(rows.shape[2], places),
        compute_q_blocks=False,
    )
    # FlexAttention's type knows no names of tiles.
    options: Any = {
        "BACKEND": "TRITON_DECODE",
        "BLOCK_N": _tile(unit, (key.shape[3] + value.shape[3]) * key.element_size()),
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "num_stages": STAGES,
        "num_warps": WARPS,
    }
    output = flex_attention(
        rows, key, value, block_mask=listed, scale=scale, kernel_options=options
    )
    assert isinstance(output, Tensor)
    return output.flatten(1, 2)


def _tile(unit: int, key_bytes: int) -> int:
    """Keys that are read at a time: as many as there is room for, in whole parts of a unit."""
    room = TILE_BYTES // key_bytes
    return min(unit, max(LEAST, 1 << max(room.bit_length() - 1, 0)))


@lru_cache(maxsize=256)
def _compiled(unit: int, scale: float, *_kind: object) -> Callable[..., Tensor]:
    """One kernel for each kind of call."""

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        counts: Tensor,
        units: Tensor,
        lengths: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        return _attend(query, key, value, counts, units, lengths, mask, unit, scale)

    # A code object of its own: Dynamo limits recompilations per code object.
    run.__code__ = run.__code__.replace(co_name="unisparse_listed")
    return torch.compile(run, fullgraph=True, dynamic=False)
