"""The valid keys nearest to a key: what kernels write, and read, of blocks of keys with holes.

Of every key there are STEP numbers: first the next valid key in its block from it on, or Skv, and
the last one up to it, or -1. Of every block there are three: first the same of all its keys; once
the blocks are joined, of all keys from the block on, and up to its end.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _lower(one, other):
    return tl.minimum(one, other)


@triton.jit
def _higher(one, other):
    return tl.maximum(one, other)


@triton.jit
def _write_nearest(is_valid, key, of_key, of_block, kv_len):
    """Writes the first two numbers of a block's keys, and of the block, at these addresses."""
    following = tl.where(is_valid, key, kv_len)
    preceding = tl.where(is_valid, key, -1)
    tl.store(of_key, tl.associative_scan(following, 0, _lower, reverse=True))
    tl.store(of_key + 1, tl.associative_scan(preceding, 0, _higher))
    tl.store(of_block, tl.min(following, 0))
    tl.store(of_block + 1, tl.max(preceding, 0))


@triton.jit
def _join_preceding(line, block, exists, last):
    """Joins the second number of some blocks to ``last``, that of the block before; returns it."""
    preceding = tl.load(line + block * 3 + 1, mask=exists, other=-1)
    highest = tl.maximum(tl.associative_scan(preceding, 0, _higher), last)
    tl.store(line + block * 3 + 1, highest, mask=exists)
    return tl.maximum(last, tl.max(preceding, 0))


@triton.jit
def _join_following(line, kv_len, blocks, STEP: tl.constexpr):
    """Joins the first number of all blocks, STEP of them at a time, from the last one on."""
    first = kv_len
    steps = (blocks + STEP - 1) // STEP
    for step in range(0, steps):
        block = (steps - 1 - step) * STEP + tl.arange(0, STEP)
        exists = block < blocks
        following = tl.load(line + block * 3, mask=exists, other=kv_len)
        lowest = tl.minimum(tl.associative_scan(following, 0, _lower, reverse=True), first)
        tl.store(line + block * 3, lowest, mask=exists)
        first = tl.minimum(first, tl.min(following, 0))


@triton.jit
def _following(key, near, line, kv_len, blocks, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The first valid key from a key on, or Skv; of keys up to Skv."""
    inside = tl.load(near + key * STEP, mask=key < kv_len, other=kv_len)
    block = key // BLOCK + 1
    beyond = tl.load(line + block * 3, mask=block < blocks, other=kv_len)
    return tl.where(inside < kv_len, inside, beyond)


@triton.jit
def _preceding(key, near, line, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The last valid key up to a key, or -1; of keys from -1 on."""
    inside = tl.load(near + key * STEP + 1, mask=key >= 0, other=-1)
    block = tl.maximum(key, 0) // BLOCK - 1
    beyond = tl.load(line + block * 3 + 1, mask=block >= 0, other=-1)
    return tl.where(inside >= 0, inside, beyond)
