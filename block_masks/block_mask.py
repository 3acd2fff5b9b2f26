"""BlockSelection to FlexAttention's BlockMask.

Symbols: B batch, Hq query heads, Nq/Nk query and key blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .block_selection import BlockSelection
from .geometry import BlockGeometry
from .mask_summary import expand_mask
from .strides import fix_strides
from .validation import FLOAT_DTYPES

if TYPE_CHECKING:
    from .selectors import Selector

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

BLOCK_LISTS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


def create_block_mask(
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool = False,
    causal_lower_right: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    selector: Selector | None = None,
) -> BlockMask:
    """Selects blocks for ``query`` and ``key`` and returns them for stock ``flex_attention``.

    Use it where you call ``torch.nn.attention.flex_attention`` yourself. The mask is right
    whether flex is compiled or not.

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D]; Hkv divides Hq.
        is_causal: Query row r sees the keys up to r (top-left), as in SDPA.
        causal_lower_right: Query row r sees the keys up to r + Skv - Sq, so that the last row is
            aligned with the last key, as a chunk of a prompt and decoding with a cache need;
            needs Sq <= Skv, and goes without ``is_causal``.
        attn_mask: bool, broadcastable to [B, Hq, Sq, Skv]; becomes part of ``mask_mod``; not with
            a causal flag. A float mask is a bias and belongs into flex's ``score_mod``.
        scale: Factor on the logits; 1 / sqrt(D) by default.
        selector: Which blocks are kept; `DEFAULT_SELECTOR` by default.

    Returns:
        BlockMask with B batches and Hq (or 1) heads.

    Raises:
        TypeError: Not tensors, mixed dtypes, or a float ``attn_mask``.
        ValueError: Ranks, heads, devices or lengths that do not go together; two of ``is_causal``,
            ``causal_lower_right`` and ``attn_mask``.
    """
    from .selectors import DEFAULT_SELECTOR, validate_selector

    if isinstance(attn_mask, Tensor) and attn_mask.dtype in FLOAT_DTYPES:
        raise TypeError(
            f"attn_mask must be bool here, got {attn_mask.dtype}: a BlockMask holds no bias; "
            "add it in flex_attention's score_mod, or call unisparse_flex.attention"
        )
    selector = DEFAULT_SELECTOR if selector is None else selector
    validate_selector(selector)
    selection = selector.select(
        query,
        key,
        is_causal=is_causal,
        causal_lower_right=causal_lower_right,
        attn_mask=attn_mask,
        scale=scale,
    )
    mask_mod = selection_mask_mod(selection)
    if attn_mask is not None:
        mask_mod = _and_attn_mask(mask_mod, expand_mask(attn_mask, selection.geometry))
    return to_block_mask(selection, mask_mod, partial_only=attn_mask is not None)


def to_block_mask(
    selection: BlockSelection,
    mask_mod: MaskMod,
    *,
    partial_only: bool = False,
    compute_q_blocks: bool = True,
) -> BlockMask:
    """Wraps a selection's block lists and a ``mask_mod`` in a BlockMask.

    Args:
        selection: The kept blocks.
        mask_mod: Compiled flex evaluates it in partial blocks only, uncompiled flex everywhere
            and nothing else: a mask that may be used uncompiled needs `selection_mask_mod`.
        partial_only: Lists every block as partial: ``mask_mod`` says more than causality.
        compute_q_blocks: Adds the transposed lists that the backward pass needs.
    """
    geometry = selection.geometry
    mask = BlockMask.from_kv_blocks(
        *selection.block_lists(partial_only=partial_only),
        BLOCK_SIZE=geometry.block_size,
        mask_mod=mask_mod,
        seq_lengths=(geometry.q_len, geometry.kv_len),
        compute_q_blocks=compute_q_blocks,
    )
    # What a kernel listed needs no copy: Inductor keeps the strides of what it does not compute.
    computed = BLOCK_LISTS[4:] if selection.lists is not None and not partial_only else BLOCK_LISTS
    names = [name for name in computed if getattr(mask, name) is not None]
    if not names:
        return mask
    for name, tensor in zip(
        names, fix_strides([getattr(mask, name) for name in names]), strict=True
    ):
        setattr(mask, name, tensor)
    return mask


def causal_mask_mod(geometry: BlockGeometry) -> MaskMod:
    """What partial blocks need beside the block lists: causality, `mask`, the end of the keys."""

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return geometry.sees(b, q_idx, kv_idx)

    return mask_mod


def selection_mask_mod(selection: BlockSelection) -> MaskMod:
    """A ``mask_mod`` that looks the kept blocks up: the whole truth, block lists or not."""
    keep, size = selection.keep, selection.geometry.block_size
    heads = keep.shape[1]
    inner = causal_mask_mod(selection.geometry)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        kept = keep[b, h if heads > 1 else 0, q_idx // size, kv_idx // size]
        return kept & inner(b, h, q_idx, kv_idx)

    return mask_mod


def _and_attn_mask(inner: MaskMod, mask: Tensor) -> MaskMod:
    batch, heads = mask.shape[:2]

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        allowed = mask[b if batch != 1 else 0, h if heads > 1 else 0, q_idx, kv_idx]
        return allowed & inner(b, h, q_idx, kv_idx)

    return mask_mod
