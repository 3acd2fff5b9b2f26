"""A selection for queries whose keys lie in pages.

Symbols: Hq/Hkv heads, Sq query rows, D head_dim, Nq/Nk blocks.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .. import kernels
from ..block_lists import BlockLists
from ..block_selection import BlockSelection
from ..geometry import BlockGeometry
from ..granularity import Sampled
from ..scoring import compute_block_scores, compute_sampled_scores
from ..selectors import Selector, UniSparse
from .paged_keys import PagedKeys


def paged_obstacle(selector: Selector, pages: Tensor) -> str | None:
    """Why a selector needs a copy of the keys beside the pages; ``None`` where it reads these.

    Args:
        selector: Which blocks are kept.
        pages: [all pages, Hkv, P, D].
    """
    if not isinstance(selector, UniSparse):
        return f"{type(selector).__name__} reads keys that lie in one piece"
    if pages.device.type != "cuda":
        return "plain PyTorch scores keys that lie in one piece"
    if selector.sampled_queries and not kernels.supports_pages(pages, selector.block_size):
        return f"the kernels read pages of 64 keys or a multiple of it, got {pages.shape[2]}"
    return None


def select_from_pages(
    selector: Selector,
    query: Tensor,
    keys: PagedKeys,
    *,
    geometry: BlockGeometry,
    scale: float,
) -> BlockLists:
    """Selects as `Selector.compute_selection`, and keeps the blocks of the rows' own positions.

    `UniSparse` takes its composite keys from the pages' means. Where `paged_obstacle` is ``None``
    nothing is copied.

    Args:
        selector: Which blocks are kept.
        query: [1, Hq, Sq, D], the last rows of the sequence.
        keys: Those of the sequence.
        geometry: The block grid; causal, aligned with the last key, without a mask.
        scale: Factor on the logits.

    Returns:
        The kept blocks, [1, Hq or 1, Nq, Nk], counted along the sequence.
    """
    if isinstance(selector, UniSparse):
        obstacle = paged_obstacle(selector, keys.pages) or selector.kernel_obstacle(
            query, keys.pages, geometry=geometry, scale=scale, attn_mask=None
        )
        if obstacle is None:
            return kernels.select_lists_from_pages(
                query,
                keys.pages,
                keys.table,
                keys.means,
                kernels.settings_of(selector),
                geometry=geometry,
                scale=scale,
            )
        if query.device.type != "cuda":
            return _with_own_blocks(_by_means(selector, query, keys, geometry, scale))
    selection = selector.compute_selection(
        query, keys.gather(), geometry=geometry, scale=scale, attn_mask=None
    )
    return _with_own_blocks(selection)


def _by_means(
    selector: UniSparse, query: Tensor, keys: PagedKeys, geometry: BlockGeometry, scale: float
) -> BlockSelection:
    """What the kernels compute, in plain PyTorch."""
    composites = keys.composites(
        selector.c_k, groups=geometry.num_groups(selector.c_q, selector.c_k)[1]
    )
    scores = compute_block_scores(
        query, composites, geometry=geometry, granularity=selector.granularity, scale=scale
    )
    if selector.sampled_queries:
        exact = compute_sampled_scores(
            query,
            keys.gather(),
            geometry=geometry,
            granularity=Sampled(queries=selector.sampled_queries, heads=selector.c_h),
            scale=scale,
        )
        scores = (scores + exact) / 2
    return selector.select_by(selector.rule, scores, geometry=geometry, q_heads=query.shape[1])


def _with_own_blocks(selection: BlockSelection) -> BlockLists:
    own = selection.geometry.local_blocks(1, selection.keep.device)
    kept = replace(selection, keep=(selection.keep | own) & selection.visible, lists=None)
    return BlockLists(*kept.block_lists())
