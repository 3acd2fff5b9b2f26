"""Queries and keys to block lists: the kernels, one after the other, within bounded scratch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_lists import BlockLists
from ..geometry import BlockGeometry
from ..key_intervals import IntervalTables
from .pages import pool_pages
from .pool import Side, pool, pool_both
from .recording import empty
from .score import Scored, held_blocks, score, score_both, supports_descriptor
from .scratch import Masses, Rows, power_of_two, reach_of
from .select import select
from .settings import KernelSettings

# Scratch that scores may take at a time; more is computed in turns.
SCRATCH_BYTES = 128 * 2**20
# Blocks up to which a launch more costs more than it saves.
LEAST_POWER = 256


def pool_keys(key: Tensor, *, group: int, block_size: int, blocks: int) -> Tensor:
    """Composite keys as `compute_lists` takes them.

    Args:
        key: [B, Hkv, Skv, D] on the GPU.
        group: Keys per composite key.
        block_size: Tokens per block.
        blocks: Key blocks in the result, ``ceil(Skv / block_size)`` or more.

    Returns:
        [B, Hkv, blocks * block_size / group, D] in key's dtype.
    """
    batch, kv_heads = key.shape[:2]
    side = Side(tokens=key, blocks=blocks, group=group)
    pooled, _, _ = pool(side, kv_heads=kv_heads, block_size=block_size)
    assert pooled is not None
    return pooled.tokens.unflatten(0, (batch, kv_heads))


def compute_lists(
    query: Tensor,
    key: Tensor,
    settings: KernelSettings,
    *,
    geometry: BlockGeometry,
    scale: float,
    are_composites: bool = False,
    intervals: IntervalTables | None = None,
    head_thresholds: Tensor | None = None,
) -> BlockLists:
    """Chooses key blocks for every query block and head.

    Args:
        query: [B, Hq, Sq, D] on the GPU: float16, bfloat16 or float32.
        key: [B, Hkv, Skv, D].
        settings: How blocks are scored, and which are kept.
        geometry: The block grid.
        scale: Factor on the logits, above 0.
        are_composites: Whether ``key`` holds what `pool_keys` made of the keys of all blocks;
            nothing can be sampled then.
        intervals: What the geometry's mask hides, where it has one.
        head_thresholds: float32 [Hq], those of the settings, where they have any.

    Returns:
        The block lists.
    """
    batch, q_heads = query.shape[:2]
    kv_heads = key.shape[1]
    if not (are_composites or supports_descriptor(key)):
        key = key.contiguous()
    size, c_k = settings.block_size, settings.c_k
    q_blocks, kv_blocks = geometry.num_q_blocks, geometry.num_kv_blocks
    queries = _side_of(query, settings, q_blocks)
    if intervals is not None:
        queries = replace(queries, valid=intervals.row_valid.view(torch.uint8))
    held = held_blocks(key, size // c_k) if c_k > 1 else 1
    blocks = -(-kv_blocks // held) * held
    composite_keys = None
    if are_composites or not settings.c_q:
        composites, samples, _ = pool(queries, kv_heads=kv_heads, block_size=size)
        if settings.c_q:
            composite_keys = _interleave(key, held, blocks, size // c_k)
    else:
        keys = Side(tokens=key, blocks=blocks, group=c_k, held=held)
        if intervals is not None:
            keys = replace(keys, valid=intervals.key_valid.view(torch.uint8))
        composites, samples, pooled = pool_both(queries, keys, kv_heads=kv_heads, block_size=size)
        assert pooled is not None
        composite_keys = pooled.tokens.unflatten(0, (batch, kv_heads))
    counts = (batch, q_heads, q_blocks)
    shapes = (counts, (*counts, kv_blocks)) * 2
    lists = BlockLists(*(empty(query, shape, torch.int32) for shape in shapes))
    return _fill(
        lists,
        composites,
        samples,
        composite_keys,
        key,
        settings,
        geometry=geometry,
        scale=scale,
        intervals=intervals,
        head_thresholds=head_thresholds,
    )


def compute_lists_from_pages(
    query: Tensor,
    pages: Tensor,
    table: Tensor,
    means: Tensor,
    settings: KernelSettings,
    *,
    geometry: BlockGeometry,
    scale: float,
    head_thresholds: Tensor | None = None,
) -> BlockLists:
    """`compute_lists` for the keys of one sequence in the pages of a cache.

    Args:
        query: [1, Hq, Sq, D] on the GPU.
        pages: [all pages, Hkv, P, D], a view of the cache that `supports_pages` accepts.
        table: int32 [n], the sequence's pages in order.
        means: [all pages, Hkv, groups, D], see `pages.summarize`.
        settings: See `compute_lists`, as what follows.
        geometry: The block grid.
        scale: Factor on the logits.
        head_thresholds: See `compute_lists`.

    Returns:
        The block lists; blocks are counted along the sequence, not by page.
    """
    kv_heads = pages.shape[1]
    size, c_k = settings.block_size, settings.c_k
    q_blocks, kv_blocks = geometry.num_q_blocks, geometry.num_kv_blocks
    queries = _side_of(query, settings, q_blocks)
    composites, samples, _ = pool(queries, kv_heads=kv_heads, block_size=size)
    held = held_blocks(pages, size // c_k) if c_k > 1 else 1
    groups = -(-kv_blocks // held) * held * (size // c_k)
    pooled = pool_pages(pages, table, means, length=geometry.kv_len, group=c_k, groups=groups)
    composite_keys = pooled
    if held > 1 and c_k < size:
        composite_keys = _interleave(pooled, held, groups * c_k // size, size // c_k)
    counts = (1, query.shape[1], q_blocks)
    shapes = (counts, (*counts, kv_blocks)) * 2
    return _fill(
        BlockLists(*(empty(query, shape, torch.int32) for shape in shapes)),
        composites,
        samples,
        composite_keys,
        pages,
        settings,
        geometry=geometry,
        scale=scale,
        table=table,
        head_thresholds=head_thresholds,
    )


def _side_of(query: Tensor, settings: KernelSettings, blocks: int) -> Side:
    """What is made of queries."""
    return Side(
        tokens=query,
        blocks=blocks,
        merged=settings.c_h,
        group=settings.c_q,
        step=settings.sample_step,
    )


def _fill(
    lists: BlockLists,
    composites: Rows | None,
    samples: Rows | None,
    composite_keys: Tensor | None,
    key: Tensor,
    settings: KernelSettings,
    *,
    geometry: BlockGeometry,
    scale: float,
    intervals: IntervalTables | None = None,
    table: Tensor | None = None,
    head_thresholds: Tensor | None = None,
) -> BlockLists:
    """Scores what was pooled and picked, and selects, in turns."""
    size, c_q, c_k = settings.block_size, settings.c_q, settings.c_k
    batch, q_heads = lists.kv_num_blocks.shape[:2]
    kv_heads = key.shape[1]
    composite_heads = q_heads // kv_heads // settings.c_h
    rows = composite_heads * max(size // c_q if c_q else 0, settings.sampled_queries)
    row_bytes = rows * (4 if key.dtype == torch.float32 else 2)
    total = batch * kv_heads
    coarse = fine = None
    if composites is not None and composite_keys is not None:
        coarse = Scored(composites, composite_keys, c_k, -(-geometry.kv_len // c_k))
    if samples is not None:
        fine = Scored(samples, key, 1, geometry.kv_len, sampled=True)
    for part in turns(geometry, row_bytes):
        needed = row_bytes * (part.stop - part.start) * reach_of(geometry, part)
        at_once = max(1, SCRATCH_BYTES // needed)
        for head in range(0, total, at_once):
            turn: dict[str, Any] = {
                "geometry": geometry,
                "heads": slice(head, min(head + at_once, total)),
                "q_blocks": part,
                "intervals": intervals,
            }
            select(
                *_score(coarse, fine, table=table, scale=scale, **turn),
                lists,
                settings,
                composite_heads=composite_heads,
                head_thresholds=head_thresholds,
                least_power=1 if table is None else LEAST_POWER,
                **turn,
            )
    return lists


def _score(
    coarse: Scored | None, fine: Scored | None, *, table: Tensor | None, **turn: Any
) -> tuple[Masses | None, Masses | None]:
    """Scores both, or what there is of them; see `score`."""
    if coarse is not None and fine is not None and table is None:
        return score_both(coarse, fine, **turn)
    return (
        None if coarse is None else score(coarse, table=table, **turn),
        None if fine is None else score(fine, table=table, **turn),
    )


def _interleave(composites: Tensor, held: int, blocks: int, groups: int) -> Tensor:
    """Composite keys in the order in which `pool` writes those of ``held`` blocks."""
    padded = F.pad(composites, (0, 0, 0, blocks * groups - composites.shape[2]))
    tiles = padded.unflatten(2, (blocks // held, held, groups))
    return tiles.transpose(3, 4).flatten(2, 4).contiguous()


def turns(geometry: BlockGeometry, row_bytes: int) -> Iterator[slice]:
    """Query blocks that are done in one turn, for one head or more.

    Args:
        geometry: The block grid.
        row_bytes: Scratch that a query block needs for each key block it may see.

    Yields:
        Ranges that need little more scratch than SCRATCH_BYTES and, where blocks are many, end
        where the next row sees more of them than a power of two: the selection works on powers.
    """
    start = 0
    while start < geometry.num_q_blocks:
        stop = geometry.num_q_blocks
        if geometry.causal_offset is not None:
            seen = reach_of(geometry, slice(start, start + 1))
            cap = max(LEAST_POWER, power_of_two(seen))
            end = cap - -(-geometry.causal_offset // geometry.block_size)
            stop = max(start + 1, min(stop, end))
        fits = SCRATCH_BYTES // (row_bytes * reach_of(geometry, slice(start, stop)))
        stop = min(stop, start + max(1, fits))
        yield slice(start, stop)
        start = stop
