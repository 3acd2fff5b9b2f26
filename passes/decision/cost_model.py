"""What attention costs, dense and block-sparse: symbolic work, bytes and seconds.

>>> work = attention_work(causal=True)
>>> work.dense_flops.subs({B: 1, Hq: 1, Sq: 128, Skv: 128, offset: 0, tile: 1, D: 64, Dv: 64})
2113536

Work of selection is counted as plain PyTorch does it (`block_masks.scoring`,
`block_masks.selection`); GPU kernels write no logits and sort nothing. Seconds divide it by the
rates of a device (`device_rates.DeviceRates`), whose fields are symbols of the same names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import sympy
from sympy import Max, Min, Symbol, ceiling, floor

B, Hq, Hkv, Sq, Skv, D, Dv = sympy.symbols("B Hq Hkv Sq Skv D Dv", integer=True, positive=True)
# Key position of query row 0; tokens per block; query rows, keys and heads per composite token.
offset = Symbol("offset", integer=True, nonnegative=True)
block, c_q, c_k, c_h = sympy.symbols("block c_q c_k c_h", integer=True, positive=True)
# Query rows of a block that meet every key.
samples = Symbol("samples", integer=True, nonnegative=True)
# Keys that a dense kernel reads at a time, computed whole on the diagonal.
tile = Symbol("tile", integer=True, positive=True)
# Kept over visible blocks; bytes per element; 1 under a mask beside causality, else 0; 1 where
# plain PyTorch selects, 0 where GPU kernels do.
density, itemsize, masked, plain = sympy.symbols("density itemsize masked plain", nonnegative=True)

# float32 composite logits: written once, read for the peak, the row sum and the sum of a block.
LOGIT_BYTES = 4 * 4
SHAPE = (B, Hq, Hkv, Sq, Skv, D, Dv, offset, masked, plain, itemsize)
SETTINGS = (block, c_q, c_k, c_h, samples, density, tile)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionWork:
    """Work of one attention call, as sympy expressions in this module's symbols.

    FLOPs count a multiplication and an addition as two.

    Attributes:
        dense_flops: Both matrix products over the visible (query, key) pairs and what else lies
            in their tiles; only visible pairs at ``tile`` 1.
        dense_exps: Exponentials of dense attention, one a pair.
        dense_bytes: Query, key, value and mask read once, output written once.
        masked_flops: `dense_flops` under a mask tensor, of which no kernel skips a tile.
        masked_exps: `dense_exps` likewise.
        pooling_bytes: Query and key read, composite tokens written.
        scoring_flops: Logits of composite tokens and sampled rows; all of them, causal or not.
        scoring_bytes: Passes over these logits and, under a mask, over the mask.
        sort_steps: Comparisons of one sort of block scores and two of block lists, Nk log2 Nk a
            row.
        sparse_flops: Both matrix products over the kept blocks, each computed whole.
        sparse_exps: Exponentials of sparse attention, one a pair of these.
        sparse_blocks: Kept blocks of all heads.
        sparse_bytes: As `dense_bytes`; GPU kernels read formulas and no mask.
        projection_flops: The four projections of a layer as wide as its query heads: what at least
            lies between one attention call of a model and the next.
    """

    dense_flops: sympy.Expr
    dense_exps: sympy.Expr
    dense_bytes: sympy.Expr
    pooling_bytes: sympy.Expr
    scoring_flops: sympy.Expr
    scoring_bytes: sympy.Expr
    sort_steps: sympy.Expr
    sparse_flops: sympy.Expr
    sparse_exps: sympy.Expr
    sparse_blocks: sympy.Expr
    sparse_bytes: sympy.Expr
    masked_flops: sympy.Expr
    masked_exps: sympy.Expr
    projection_flops: sympy.Expr


@lru_cache
def attention_work(*, causal: bool) -> AttentionWork:
    """The work of one call; with ``causal``, row r sees the keys up to ``r + offset``."""
    blocks_q, blocks_k = ceiling(Sq / block), ceiling(Skv / block)
    if causal:
        rising = _rising(Sq, Skv, offset)
        pairs = _tiled(offset + rising) - _tiled(offset) + (Sq - rising) * Skv
        visible_blocks = _staircase(blocks_q, blocks_k, ceiling(offset / block))
    else:
        pairs, visible_blocks = Sq * Skv, blocks_q * blocks_k
    rows, columns = blocks_q * block / c_q, blocks_k * block / c_k
    composite_heads = Hq / c_h
    kept_blocks = density * B * Hq * visible_blocks
    cells = B * composite_heads * (rows * columns + blocks_q * samples * Skv)
    own_bytes = (Hq * Sq + Hkv * Skv) * (D + Dv)
    return AttentionWork(
        dense_flops=2 * B * Hq * pairs * (D + Dv),
        dense_exps=B * Hq * pairs,
        dense_bytes=itemsize * B * (own_bytes + masked * Sq * Skv),
        masked_flops=2 * B * Hq * Sq * Skv * (D + Dv),
        masked_exps=B * Hq * Sq * Skv,
        pooling_bytes=B * D * (itemsize * (Hq * Sq + Hkv * Skv) + 4 * (Hq * rows + Hkv * columns)),
        scoring_flops=2 * cells * D,
        scoring_bytes=plain * (LOGIT_BYTES * cells + masked * B * Sq * Skv),
        sort_steps=plain
        * B
        * (composite_heads + 2 * Hq)
        * blocks_q
        * blocks_k
        * sympy.log(blocks_k, 2),
        sparse_flops=2 * kept_blocks * block**2 * (D + Dv),
        sparse_exps=kept_blocks * block**2,
        sparse_blocks=kept_blocks,
        sparse_bytes=itemsize * B * (own_bytes + plain * masked * Sq * Skv),
        projection_flops=4 * B * Sq * Hq * D * D * (Hq + Hkv),
    )


def _rising(rows: sympy.Expr, columns: sympy.Expr, start: sympy.Expr) -> sympy.Expr:
    """How many rows r have ``start + r + 1 <= columns``."""
    return Max(0, Min(rows, columns - start))


def _staircase(rows: sympy.Expr, columns: sympy.Expr, start: sympy.Expr) -> sympy.Expr:
    """Sum over r < rows of min(columns, start + r + 1)."""
    rising = _rising(rows, columns, start)
    return rising * start + rising * (rising + 1) / 2 + (rows - rising) * columns


def _tiled(rows: sympy.Expr) -> sympy.Expr:
    """Sum over r < rows of r + 1 rounded up to whole tiles, at most Skv."""
    whole = floor(rows / tile)
    return tile**2 * whole * (whole + 1) / 2 + (rows - whole * tile) * Min((whole + 1) * tile, Skv)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage as a sum of terms, so that its seconds are linear in what a fit looks for.

    Attributes:
        constants: Names of rates that are seconds, each with how often it is paid.
        divided: Names of rates that are work a second, each with the work.
    """

    constants: dict[str, sympy.Expr]
    divided: dict[str, sympy.Expr]

    @property
    def seconds(self) -> sympy.Expr:
        """Predicted seconds, in the symbols of the shape and of the rates."""
        paid = sum(times * Symbol(name) for name, times in self.constants.items())
        return paid + sum(work / Symbol(name) for name, work in self.divided.items())


@lru_cache
def attention_stages(*, causal: bool) -> dict[str, Stage]:
    """The stages of a call: ``select`` and ``attend`` where it is sparse.

    Or ``dense``; under a mask tensor ``masked``. ``projections`` are what a model computes around
    it.
    """
    work = attention_work(causal=causal)
    one = sympy.Integer(1)
    return {
        "dense": Stage(
            constants={"dense_launch": one},
            divided={
                "dense_flop_rate": work.dense_flops,
                "dense_exp_rate": work.dense_exps,
                "bandwidth": work.dense_bytes,
            },
        ),
        "masked": Stage(
            constants={"dense_launch": one},
            divided={
                "masked_flop_rate": work.masked_flops,
                "masked_exp_rate": work.masked_exps,
                "bandwidth": work.dense_bytes,
            },
        ),
        "select": Stage(
            constants={"select_launch": one},
            divided={
                "scoring_flop_rate": work.scoring_flops,
                "bandwidth": work.pooling_bytes + work.scoring_bytes,
                "sort_rate": work.sort_steps,
            },
        ),
        "attend": Stage(
            constants={"sparse_launch": one, "block_seconds": work.sparse_blocks},
            divided={
                "sparse_flop_rate": work.sparse_flops,
                "sparse_exp_rate": work.sparse_exps,
                "bandwidth": work.sparse_bytes,
            },
        ),
        "projections": Stage(constants={}, divided={"dense_flop_rate": work.projection_flops}),
    }
