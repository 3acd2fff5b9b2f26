"""Columns and diagonals of the last queries by their definition: loops in float64.

Symbols: S tokens, D head_dim, Nq/Nk blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unisparse_flex.block_masks import ForcedBlocks

Rows = list[list[bool]]


def tokens(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Noise on a walk in steps of 8 tokens, which survives pooling: [B, H, S, D]."""
    batch, heads, length, head_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def noise(count: int) -> Tensor:
        return torch.randn(batch, heads, count, head_dim, dtype=dtype, generator=generator)

    drift = noise(-(-length // 8)).repeat_interleave(8, 2)[:, :, :length]
    return noise(length) + 1.5 * drift


def per_head(query: Tensor, key: Tensor, one: Callable[[Tensor, Tensor, int], Rows]) -> Tensor:
    """``one`` of query [Sq, D], key [Skv, D] and the head's number: bool [B, Hq, Nq, Nk]."""
    group = query.shape[1] // key.shape[1]
    return torch.tensor(
        [
            [
                one(query[b, h].double(), key[b, h // group].double(), h)
                for h in range(len(query[b]))
            ]
            for b in range(len(query))
        ]
    )


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def column_and_diagonal_mass(
    query: Tensor, key: Tensor, count: int
) -> tuple[list[float], list[float]]:
    """Mass of every key and of every distance back, over the last ``count`` rows of a head."""
    q_len, kv_len = len(query), len(key)
    rows = range(max(0, q_len - count), q_len)
    columns, diagonals = [0.0] * kv_len, [0.0] * kv_len
    for row in rows:
        position = row + kv_len - q_len
        logits = (key[: position + 1] @ query[row] / math.sqrt(len(query[row]))).tolist()
        for column, share in enumerate(softmax(logits)):
            columns[column] += share / len(rows)
            diagonals[position - column] += share / len(rows)
    return columns, diagonals


def highest(mass: list[float], count: int, forced: int) -> set[int]:
    """The first ``forced`` entries, then the highest up to ``count`` in all, lower ones first."""
    order = sorted(range(len(mass)), key=lambda n: (n >= forced, -mass[n], n))
    return set(order[: max(count, forced)])


def positions(i: int, q_len: int, kv_len: int, size: int) -> range:
    """Key positions of the rows of query block i."""
    return range(i * size + kv_len - q_len, min((i + 1) * size, q_len) + kv_len - q_len)


def blocks_on_lines(
    columns: set[int], diagonals: set[int], q_len: int, kv_len: int, size: int
) -> set[tuple[int, int]]:
    """Blocks (i, j) that hold a pair on one of the columns or diagonals, given in tokens."""
    found = set()
    for i in range(-(-q_len // size)):
        for position in positions(i, q_len, kv_len, size):
            found |= {(i, (position - d) // size) for d in diagonals if d <= position}
            found |= {(i, c // size) for c in columns if c <= position}
    return found


def forced_and_visible(
    blocks: ForcedBlocks, q_len: int, kv_len: int, size: int
) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Blocks that are kept in any case, and those that some row sees."""
    forced, visible = set(), set()
    rows = -(-q_len // size)
    for i in range(rows):
        own = {position // size for position in positions(i, q_len, kv_len, size)}
        for j in range(max(own) + 1):
            visible.add((i, j))
            local = any(block - blocks.local_blocks < j <= block for block in own)
            if local or j < blocks.sink_blocks or i >= rows - blocks.last_query_blocks:
                forced.add((i, j))
    return forced, visible


def as_rows(kept: set[tuple[int, int]], q_len: int, kv_len: int, size: int) -> Rows:
    return [[(i, j) in kept for j in range(-(-kv_len // size))] for i in range(-(-q_len // size))]
