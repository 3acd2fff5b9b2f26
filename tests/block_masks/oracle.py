"""Block selection by its definition: loops over rows, float64, nothing shared with the library.

Symbols: B batch, Hq/Hkv heads, Hs composite heads, Nq/Nk blocks, S tokens, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .strategies import Call


def visible_pairs(q_len: int, kv_len: int, offset: int | None) -> Tensor:
    """bool [Sq, Skv]: row r stands at key position r + offset and sees no key behind it."""
    return torch.tensor(
        [[offset is None or k <= r + offset for k in range(kv_len)] for r in range(q_len)]
    )


def tiles(pairs: Tensor, size: int) -> list[list[Tensor]]:
    """The tiles [<= size, <= size] of a matrix, ragged at its ends."""
    return [list(rows.split(size, dim=-1)) for rows in pairs.split(size, dim=-2)]


def any_in_block(pairs: Tensor, size: int) -> Tensor:
    return torch.tensor([[bool(tile.any()) for tile in row] for row in tiles(pairs, size)])


def all_in_block(pairs: Tensor, size: int) -> Tensor:
    """Blocks of ``size`` existing keys that every existing row sees."""
    return torch.tensor(
        [[bool(t.all()) and t.shape[-1] == size for t in row] for row in tiles(pairs, size)]
    )


def composite_tokens(tokens: Tensor, count: int) -> list[Tensor]:
    """Means of ``count`` consecutive tokens of [S, D]; the last mean is of those that are left."""
    return [chunk.double().mean(0) for chunk in tokens.split(count)]


def block_scores(call: Call, scale: float | None = None) -> Tensor:
    """Mass that each block holds among composite tokens: [B, Hs, Nq, Nk]."""
    query, key = call.query_key()
    c_h = call.selector.c_h
    per_element = [
        [
            _head_scores(
                query[b, first : first + c_h],
                key[b, first // call.group],
                call,
                1 / math.sqrt(query.shape[-1]) if scale is None else scale,
            )
            for first in range(0, call.q_heads, c_h)
        ]
        for b in range(call.batch)
    ]
    return torch.stack([torch.stack(heads) for heads in per_element])


def _head_scores(heads: Tensor, key: Tensor, call: Call, scale: float) -> Tensor:
    size, c_q, c_k = call.selector.block_size, call.selector.c_q, call.selector.c_k
    pooled = [composite_tokens(head, c_q) for head in heads]
    queries = [sum(same_rows) / len(heads) for same_rows in zip(*pooled, strict=True)]
    keys = torch.stack(composite_tokens(key, c_k))
    counts = torch.tensor([len(chunk) for chunk in key.split(c_k)], dtype=torch.float64)
    scores = torch.zeros(-(-call.q_len // size), -(-call.kv_len // size), dtype=torch.float64)
    for r, composite in enumerate(queries):
        rows = range(r * c_q, min((r + 1) * c_q, call.q_len))
        last_position = call.kv_len if call.offset is None else rows[-1] + call.offset
        seen = sum(c * c_k <= last_position for c in range(len(keys)))
        logits = keys[:seen] @ composite * scale + counts[:seen].log()
        for block, mass in enumerate(logits.softmax(0).split(size // c_k)):
            scores[rows[0] // size, block] += len(rows) * mass.sum()
    return scores / scores.sum(-1, keepdim=True)


def forced_blocks(call: Call) -> Tensor:
    """bool [Nq, Nk]: sinks, the rows' own positions and their neighbours, the last query rows."""
    size, selector = call.selector.block_size, call.selector
    q_blocks, kv_blocks = -(-call.q_len // size), -(-call.kv_len // size)
    forced = torch.zeros(q_blocks, kv_blocks, dtype=torch.bool)
    for i in range(q_blocks):
        for j in range(kv_blocks):
            sink = j < selector.sink_blocks
            last = i >= q_blocks - selector.last_query_blocks
            forced[i, j] = sink or last or _is_local(call, i, j)
    return forced


def _is_local(call: Call, i: int, j: int) -> bool:
    size, reach = call.selector.block_size, call.selector.local_blocks - 1
    if call.offset is None:
        return call.q_len == call.kv_len and abs(i - j) <= reach
    rows = range(i * size, min((i + 1) * size, call.q_len))
    own = {(row + call.offset) // size for row in rows}
    return any(block - reach <= j <= block for block in own)


def choose_row(
    scores: Sequence[float],
    forced: Sequence[bool],
    visible: Sequence[bool],
    *,
    top_p: float | None = None,
    top_k: int | None = None,
) -> tuple[list[bool], float]:
    """One row's kept blocks, and how far its cumulative mass stays from ``top_p``."""
    kept = [bool(f and v) for f, v in zip(forced, visible, strict=True)]
    mass = sum(score for score, keep in zip(scores, kept, strict=True) if keep)
    margin = math.inf
    rest = [j for j, v in enumerate(visible) if v and not kept[j]]
    for j in sorted(rest, key=lambda j: (-scores[j], j)):
        if top_k is not None:
            enough = sum(kept) >= top_k
        else:
            assert top_p is not None
            margin = min(margin, abs(mass - top_p))
            enough = top_p < 1 and mass >= top_p
        if enough:
            break
        kept[j] = True
        mass += scores[j]
    return kept, margin


def choose(scores: Tensor, call: Call) -> tuple[Tensor, float]:
    """Applies `choose_row` to [B, Hs, Nq, Nk]; also the smallest margin."""
    pairs = visible_pairs(call.q_len, call.kv_len, call.offset)
    visible = any_in_block(pairs, call.selector.block_size).tolist()
    forced = forced_blocks(call).tolist()
    keep = torch.zeros_like(scores, dtype=torch.bool)
    margins = [math.inf]
    rule: dict[str, Any] = {"top_p": call.selector.top_p, "top_k": call.selector.top_k}
    for b, head, i in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        row, margin = choose_row(scores[b, head, i].tolist(), forced[i], visible[i], **rule)
        keep[b, head, i] = torch.tensor(row)
        margins.append(margin)
    return keep, min(margins)


def per_query_head(keep: Tensor, call: Call) -> Tensor:
    """Gives every query head its composite head's selection: [B, Hq, Nq, Nk]."""
    return torch.stack([keep[:, head // call.selector.c_h] for head in range(call.q_heads)], dim=1)
