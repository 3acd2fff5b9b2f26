"""Composite tokens on the GPU: one streaming pass over queries, keys or both.

Symbols: B batch, H composite heads, S tokens, D head_dim, N blocks, R groups of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .recording import empty
from .scratch import Rows, power_of_two

# Tokens of a group that are read one after the other. Longer ones, which would take seconds to
# compile so, are read in tiles.
UNROLLED, TILE = tl.constexpr(16), tl.constexpr(32)


@triton.jit
def _pool_block(
    block,
    head,
    batch,
    tokens,
    means,
    lasts,
    valid,
    stride_b,
    stride_h,
    stride_s,
    stride_d,
    length,
    blocks,
    stride_valid,
    kv_heads,
    head_dim,
    MERGED: tl.constexpr,
    HEADS: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Means of GROUP tokens and, of every STEP tokens, the last: 0 for none of either.

    With MASKED, means are of the tokens that ``valid`` marks, and 0 where there are none.

    MERGED consecutive heads are averaged; HEADS composite heads share a key head. The means of
    HELD blocks are interleaved: first those of their first groups.
    """
    column = tl.arange(0, WIDTH)
    inside = column < head_dim
    base = tokens + batch.to(tl.int64) * stride_b + head.to(tl.int64) * MERGED * stride_h
    # Rows of a block lie together, those of the heads that share keys after one another.
    kv_head = head // HEADS
    line = (batch * kv_heads + kv_head).to(tl.int64) * blocks
    slot = (line + block) * HEADS + head % HEADS
    if GROUP > 0:
        groups: tl.constexpr = BLOCK // GROUP
        first = block * BLOCK + tl.arange(0, groups) * GROUP
        total = tl.zeros([groups, WIDTH], dtype=tl.float32)
        marked = tl.zeros([groups], dtype=tl.int32)
        for merged in tl.static_range(MERGED):
            head_base = base + merged * stride_h
            if GROUP <= UNROLLED:
                for i in tl.static_range(GROUP):
                    row = first + i
                    counted = row < length
                    if MASKED:
                        mark = tl.load(valid + batch * stride_valid + row, mask=counted, other=0)
                        counted = mark > 0
                        marked += counted.to(tl.int32)
                    at = head_base + row[:, None].to(tl.int64) * stride_s
                    exists = counted[:, None] & inside[None, :]
                    token = tl.load(at + column[None, :] * stride_d, mask=exists, other=0.0)
                    total += token.to(tl.float32)
            else:
                tile = tl.zeros([groups, TILE, WIDTH], dtype=tl.float32)
                for start in range(0, GROUP, TILE):
                    row = first[:, None] + (start + tl.arange(0, TILE))[None, :]
                    counted = row < length
                    if MASKED:
                        mark = tl.load(valid + batch * stride_valid + row, mask=counted, other=0)
                        counted = mark > 0
                        marked += tl.sum(counted.to(tl.int32), 1)
                    at = head_base + row[:, :, None].to(tl.int64) * stride_s
                    exists = counted[:, :, None] & inside[None, None, :]
                    token = tl.load(at + column[None, None, :] * stride_d, mask=exists, other=0.0)
                    tile += token.to(tl.float32)
                total += tl.sum(tile, 1)
        count = tl.minimum(tl.maximum(length - first, 1), GROUP) * MERGED
        if MASKED:
            count = tl.maximum(marked, 1)
        mean = total / count[:, None].to(tl.float32)
        # A NaN in the scores keeps a row whole; an infinity could vanish in a softmax.
        mean = tl.where(tl.abs(mean) < float("inf"), mean, float("nan"))
        first_held = (line + block // HELD * HELD) * HEADS + head % HEADS
        place = first_held * groups + tl.arange(0, groups) * HELD + block % HELD
        at = means + place[:, None] * head_dim + column[None, :]
        tl.store(at, mean.to(means.dtype.element_ty), mask=inside[None, :])
    if STEP > 0:
        steps: tl.constexpr = BLOCK // STEP
        row = tl.minimum(block * BLOCK + (tl.arange(0, steps) + 1) * STEP, length) - 1
        total = tl.zeros([steps, WIDTH], dtype=tl.float32)
        for merged in tl.static_range(MERGED):
            at = base + merged * stride_h + row[:, None].to(tl.int64) * stride_s
            total += tl.load(at + column[None, :] * stride_d, mask=inside[None, :], other=0.0).to(
                tl.float32
            )
        step = tl.arange(0, steps)
        at = lasts + (slot * steps + step[:, None]) * head_dim + column[None, :]
        tl.store(at, (total / MERGED).to(lasts.dtype.element_ty), mask=inside[None, :])


LENGTHS = [
    "length",
    "blocks",
    "stride_valid",
    "key_length",
    "key_blocks",
    "stride_key_valid",
    "heads",
    "kv_heads",
]


@triton.jit(do_not_specialize=LENGTHS)
def _pool(
    tokens,
    means,
    lasts,
    valid,
    stride_b,
    stride_h,
    stride_s,
    stride_d,
    length,
    blocks,
    stride_valid,
    keys,
    key_means,
    key_valid,
    stride_key_b,
    stride_key_h,
    stride_key_s,
    stride_key_d,
    key_length,
    key_blocks,
    stride_key_valid,
    heads,
    kv_heads,
    head_dim,
    MERGED: tl.constexpr,
    HEADS: tl.constexpr,
    HELD: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    KEY_HELD: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A block and head a program; with KEY_GROUP first those of ``tokens``, then of ``keys``."""
    batch = tl.program_id(2)
    if KEY_GROUP > 0:
        program = tl.program_id(0)
        behind = program - blocks * heads
        if behind >= 0:
            _pool_block(
                behind % key_blocks, behind // key_blocks, batch,
                keys, key_means, key_means, key_valid,
                stride_key_b, stride_key_h, stride_key_s, stride_key_d,
                key_length, key_blocks, stride_key_valid, kv_heads, head_dim,
                1, 1, KEY_HELD, BLOCK, KEY_GROUP, 0, WIDTH, MASKED,
            )  # fmt: skip
        else:
            _pool_block(
                program % blocks, program // blocks, batch,
                tokens, means, lasts, valid,
                stride_b, stride_h, stride_s, stride_d,
                length, blocks, stride_valid, kv_heads, head_dim,
                MERGED, HEADS, HELD, BLOCK, GROUP, STEP, WIDTH, MASKED,
            )  # fmt: skip
    else:
        _pool_block(
            tl.program_id(0), tl.program_id(1), batch,
            tokens, means, lasts, valid,
            stride_b, stride_h, stride_s, stride_d,
            length, blocks, stride_valid, kv_heads, head_dim,
            MERGED, HEADS, HELD, BLOCK, GROUP, STEP, WIDTH, MASKED,
        )  # fmt: skip


_launch = Launch(_pool)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Side:
    """Queries or keys, and what is made of them.

    Attributes:
        tokens: [B, H * merged, S, D].
        blocks: Blocks in the result, ``ceil(S / block_size)`` or more.
        merged: Consecutive heads that are averaged into one.
        group: Tokens per mean; 0 for no means.
        step: Of every ``step`` tokens the last is picked; 0 for none.
        held: Blocks whose means are interleaved, the first of each block first; divides
            ``blocks``, and is 1 where several heads share a key head.
        valid: uint8 [1 or B, S], tokens that count in means; all by default.
    """

    tokens: Tensor
    blocks: int
    merged: int = 1
    group: int = 0
    step: int = 0
    held: int = 1
    valid: Tensor | None = None

    @property
    def heads(self) -> int:
        """H."""
        return self.tokens.shape[1] // self.merged

    def rows(self, size: int, *, kv_heads: int, block_size: int) -> Rows | None:
        """Room for what stands for ``size`` tokens each."""
        if not size:
            return None
        batch, head_dim = self.tokens.shape[0], self.tokens.shape[3]
        lines = self.blocks * (self.heads // kv_heads) * (block_size // size)
        return Rows(empty(self.tokens, (batch * kv_heads, lines, head_dim)), size)

    def arguments(self) -> tuple[int, ...]:
        """What the kernel is told beside tensors."""
        shared = self.valid is None or self.valid.shape[0] == 1
        length = self.tokens.shape[2]
        return (*self.tokens.stride(), length, self.blocks, 0 if shared else length)


# Programs up to which both sides share a launch: a program that knows both takes more registers,
# which costs more than a launch where there are many.
FEW_PROGRAMS = 2048


def pool_both(
    queries: Side, keys: Side, *, kv_heads: int, block_size: int
) -> tuple[Rows | None, Rows | None, Rows | None]:
    """`pool` for queries and keys, in one launch where they are few."""
    programs = queries.blocks * queries.heads + keys.blocks * keys.heads
    if programs * queries.tokens.shape[0] <= FEW_PROGRAMS:
        return pool(queries, keys=keys, kv_heads=kv_heads, block_size=block_size)
    means, lasts, _ = pool(queries, kv_heads=kv_heads, block_size=block_size)
    key_means, _, _ = pool(keys, kv_heads=kv_heads, block_size=block_size)
    return means, lasts, key_means


def pool(
    side: Side, *, kv_heads: int, block_size: int, keys: Side | None = None
) -> tuple[Rows | None, Rows | None, Rows | None]:
    """Averages groups of tokens and picks single ones, in one pass.

    Args:
        side: Queries, or keys alone.
        kv_heads: Key heads that the heads are grouped by; divides H.
        block_size: Tokens per block.
        keys: Keys of which means are made in the same launch; none are merged or picked.

    Returns:
        The means and the picked tokens of ``side``, in the dtype of its tokens, and the means of
        ``keys``; ``None`` where not asked for.
    """
    tokens = side.tokens
    grid = {"kv_heads": kv_heads, "block_size": block_size}
    means, lasts = side.rows(side.group, **grid), side.rows(side.step, **grid)
    other = side if keys is None else keys
    key_means = None if keys is None else keys.rows(keys.group, **grid)
    programs = (side.blocks, side.heads)
    if keys is not None:
        programs = (side.blocks * side.heads + keys.blocks * keys.heads, 1)
    _launch(
        (*programs, tokens.shape[0]),
        tokens,
        tokens if means is None else means.tokens,
        tokens if lasts is None else lasts.tokens,
        tokens if side.valid is None else side.valid,
        *side.arguments(),
        other.tokens,
        other.tokens if key_means is None else key_means.tokens,
        other.tokens if other.valid is None else other.valid,
        *other.arguments(),
        side.heads,
        kv_heads,
        tokens.shape[3],
        MERGED=side.merged,
        HEADS=side.heads // kv_heads,
        HELD=side.held,
        GROUP=side.group,
        STEP=side.step,
        KEY_GROUP=0 if keys is None else keys.group,
        KEY_HELD=other.held,
        BLOCK=block_size,
        WIDTH=power_of_two(tokens.shape[3]),
        MASKED=side.valid is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return means, lasts, key_means
