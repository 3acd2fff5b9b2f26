"""What choosing blocks is expected to cost and to keep: plain numbers, for a cost model to read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .validation import validate_causality

# Tokens per unit of length in `SelectionCost.density`, whatever the block size.
REFERENCE_BLOCK = 128
# Longest length, in reference blocks, from which densities were fitted (8192 tokens).
LONGEST_FITTED = 64
# The share that top-p keeps beside the forced blocks is
#   TOP_P_SCALE * (-log(1 - top_p)) ** TOP_P_POWER * blocks ** -LENGTH_POWER,
# fitted to bench/results/density-smollm2.json: prose and code at 1024 to 8192 tokens, top_p .7
# to .99. Models with more diffuse attention keep more.
TOP_P_SCALE, TOP_P_POWER, LENGTH_POWER = 0.235, 1.6, 0.44
# The share that a threshold keeps of them depends only on threshold * blocks:
#   1 / (1 + (threshold * blocks / EVEN) ** EVEN_POWER),
# fitted to the same file, thresholds .002 to .02 over two granularities, both one for all rows and
# by the root of a row's blocks; the latter is taken at the mean row, rows counted by their blocks.
EVEN, EVEN_POWER = 0.126, 0.76


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionCost:
    """What a selector does to one attention call, before its tensors are known.

    The defaults describe a selector about which nothing is known: it scores as finely as
    `UniSparse` does and keeps half of what dense attention reads, at every length.

    Attributes:
        c_q: Query rows per composite query.
        c_k: Keys per composite key.
        c_h: Query heads per composite head.
        sampled_queries: Rows of a block that meet every key.
        has_kernels: Whether GPU kernels score and select where no mask hides keys.
        row_blocks: Blocks kept in every row in any case.
        last_query_blocks: Last query blocks that keep everything.
        share: Share kept of the remaining blocks of a call of one reference block (128 tokens).
        share_power: The share falls with the number of keys to this power, up to 8192 keys; it is
            not extrapolated to longer calls.
        thresholds: Blocks are also kept that hold this share of a row's mass: one number for all
            heads, or one for each; empty for no such rule.
        threshold_blocks: Blocks of a row for which they are stated, as in `UniSparse`.
    """

    c_q: int = 8
    c_k: int = 8
    c_h: int = 1
    sampled_queries: int = 0
    has_kernels: bool = False
    row_blocks: int = 0
    last_query_blocks: int = 0
    share: float = 0.5
    share_power: float = 0.0
    thresholds: tuple[float, ...] = ()
    threshold_blocks: int | None = None

    def density(
        self,
        *,
        q_len: int,
        kv_len: int,
        block_size: int,
        is_causal: bool = False,
        causal_lower_right: bool = False,
    ) -> float:
        """Expected kept blocks over visible blocks, in [0, 1].

        Args:
            q_len: Query rows.
            kv_len: Keys.
            block_size: Tokens per block.
            is_causal: Query row r sees the keys up to r (top-left), as in SDPA.
            causal_lower_right: Query row r sees the keys up to r + kv_len - q_len, so that the
                last row is aligned with the last key; not with ``is_causal``.

        Raises:
            TypeError: A flag is no bool.
            ValueError: Both flags.
        """
        validate_causality(is_causal, causal_lower_right)
        causal = is_causal or causal_lower_right
        if is_causal:
            # Nobody sees later keys.
            kv_len = min(kv_len, q_len)
        rows, columns = -(-q_len // block_size), -(-kv_len // block_size)
        # Rows that grow by one visible block each, up to all columns; the others see them all.
        rising = min(rows, columns) if causal else 0
        visible = rising * (2 * columns - rising + 1) / 2 + (rows - rising) * columns
        last = min(self.last_query_blocks, rows)
        forced = min(visible, (rows - last) * self.row_blocks + last * columns)
        length = min(kv_len / REFERENCE_BLOCK, LONGEST_FITTED)
        length = max(length, 1.0)
        share = min(1.0, self.share * length**-self.share_power)
        if self.thresholds:
            even = EVEN
            if self.threshold_blocks is not None:
                mean_row = length * 2 / 3 if causal and rows == columns else length
                even *= math.sqrt(mean_row / self.threshold_blocks)
            shares = [1 / (1 + (t * length / even) ** EVEN_POWER) for t in self.thresholds]
            share = max(share, sum(shares) / len(shares))
        return min(1.0, (forced + (visible - forced) * share) / visible)


def top_p_share(top_p: float) -> float:
    """`SelectionCost.share` of a top-p rule: fitted, see the constants above."""
    if top_p >= 1.0:
        return math.inf
    return TOP_P_SCALE * (-math.log1p(-top_p)) ** TOP_P_POWER
