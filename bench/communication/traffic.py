"""What context parallel attention moves between ranks, dense and block-sparse: symbolic bytes.

>>> traffic = context_traffic(composites=False)
>>> traffic.dense_bytes.subs({R: 2, B: 1, Hkv: 8, Skv: 1024, D: 64, Dv: 64, itemsize: 2})
1048576

Bytes are those that one rank receives in one call, beside `distributed.exchange`'s message of
facts; every rank holds Sq / R query rows and Skv / R keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import sympy

from unisparse_flex.passes.decision.cost_model import (
    B,
    D,
    Dv,
    Hkv,
    Hq,
    Skv,
    Sq,
    block,
    c_k,
    density,
    itemsize,
    samples,
)

# Ranks; share of the others' blocks that some row of a rank keeps.
R = sympy.Symbol("R", integer=True, positive=True)
needed = sympy.Symbol("needed", nonnegative=True)

# Bytes of a number in composite keys: itemsize where the kernels pool, 4 where plain PyTorch does.
composite_itemsize = sympy.Symbol("composite_itemsize", integer=True, positive=True)

# Block masses are float32; whether a block is needed takes a byte.
MASS_BYTES, NEED_BYTES = 4, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextTraffic:
    """Bytes that a rank receives in one call, as sympy expressions.

    Attributes:
        dense_bytes: Keys and values of all others: a ring passes them on, an all-gather at once.
        selection_bytes: What scores need of others: composite keys, or the keys.
        need_bytes: Which blocks every other rank needs.
        block_bytes: Needed blocks, without the keys where these came for the scores.
        sampled_bytes: What scores would need where sampled rows travelled to the keys instead:
            the rows, two numbers of each for its softmax, and the block masses that come back.
    """

    dense_bytes: sympy.Expr
    selection_bytes: sympy.Expr
    need_bytes: sympy.Expr
    block_bytes: sympy.Expr
    sampled_bytes: sympy.Expr

    @property
    def sparse_bytes(self) -> sympy.Expr:
        """All that a sparse call receives."""
        return self.selection_bytes + self.need_bytes + self.block_bytes


@lru_cache
def context_traffic(*, composites: bool) -> ContextTraffic:
    """The traffic of one call.

    Args:
        composites: Whether composite keys are all that the selector needs of the keys.
    """
    others = (R - 1) / R
    keys, values = (B * Hkv * Skv * width * itemsize for width in (D, Dv))
    kv_blocks = Skv / block
    rows = B * Hq * Sq / block * samples
    composite_bytes = B * Hkv * Skv / c_k * D * composite_itemsize
    masses = B * Hq * (Sq / block / R) * kv_blocks
    return ContextTraffic(
        dense_bytes=others * (keys + values),
        selection_bytes=others * (composite_bytes if composites else keys),
        need_bytes=(R - 1) * B * Hkv * kv_blocks * NEED_BYTES,
        block_bytes=others * needed * (keys + values if composites else values),
        sampled_bytes=others * (rows * (D * itemsize + 2 * MASS_BYTES) + masses * MASS_BYTES),
    )


def independent_needs() -> sympy.Expr:
    """`needed` where every row of blocks and head keeps its share by chance: the most there is.

    The least is `density`, where all rows and heads of a rank keep the same blocks.
    """
    return 1 - (1 - density) ** (Hq / Hkv * Sq / block / R)
