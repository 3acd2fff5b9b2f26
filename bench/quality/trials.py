"""Selectors that were only tried: other granularities and rules than the library ships.

They run in plain PyTorch, through the same harness: `python -m bench.quality --selectors` takes
their names too. What they gave is in docs/selectors.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unisparse_flex import Selector
from unisparse_flex.block_masks import (
    BlockGeometry,
    BlockSelection,
    MaskSummary,
    Pooled,
    Sampled,
    SelectionRule,
    Threshold,
    TopP,
    summarize,
)
from unisparse_flex.block_masks.scoring import (
    composite_logits,
    compute_mean_scores,
    row_masses,
    sampled_logits,
)
from unisparse_flex.block_masks.selectors import DROPPED_THRESHOLDS, ForcesBlocks, default_top_p
from unisparse_flex.selectors import DEFAULT_SELECTOR

from .sweeps import defaults


@dataclass(frozen=True, kw_only=True, slots=True)
class MassBudget(SelectionRule):
    """Keeps a block whose share, times the mass of all not above it to a power, reaches ``least``.

    Power 1 is the greedy minimum of the squared mass that rows lose; 0 is a threshold, and a large
    one comes near top-p.

    Attributes:
        least: Smallest product that is kept, above 0.
        power: Of the mass that is not kept yet, at least 0.
    """

    least: float
    power: float = 1.0

    def select(self, scores: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
        """See `SelectionRule.select`; equal scores are kept or dropped together."""
        free = torch.where(visible & ~forced, scores, 0.0)
        order = free.argsort(dim=-1, descending=True, stable=True)
        ranked = free.gather(-1, order)
        forced_mass = (scores * (forced & visible)).sum(-1, keepdim=True)
        above = forced_mass + F.pad(ranked.cumsum(-1)[..., :-1], (1, 0))
        # Of equals, each counts those that are truly higher.
        first = torch.searchsorted(-ranked.contiguous(), -ranked.contiguous())
        rest = (1 - above.gather(-1, first)).clamp_min(0)
        kept = (ranked * rest**self.power >= self.least) & (ranked > 0)
        chosen = torch.zeros_like(kept).scatter(-1, order, kept)
        return (chosen | forced) & visible


@dataclass(frozen=True, kw_only=True, slots=True)
class EvenShare(SelectionRule):
    """`TopPOrThreshold` whose threshold is a part of an even share.

    A row of n visible blocks keeps those that hold ``part / n`` of its mass.

    Attributes:
        part: Of an even share, above 0.
        top_p: Share of the mass that is kept at least, in (0, 1].
    """

    part: float
    top_p: float

    def select(self, scores: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
        """See `SelectionRule.select`."""
        blocks = visible.expand_as(scores).sum(-1, keepdim=True).clamp_min(1)
        high = (forced | (scores >= self.part / blocks)) & visible
        return high | TopP(top_p=self.top_p).select(scores, forced, visible)


RULES: dict[str, Callable[[float], SelectionRule]] = {
    "top_p": lambda value: TopP(top_p=value),
    "threshold": lambda value: Threshold(threshold=value),
    # The default's.
    "top_p_or_threshold": lambda value: (
        replace(DEFAULT_SELECTOR, threshold=value, top_p=default_top_p(value)).rule
    ),
    "mass_budget": lambda value: MassBudget(least=value),
    # The default's threshold and share at 64 blocks, and what is even with them at any other.
    "even_share": lambda value: EvenShare(part=value, top_p=1 - DROPPED_THRESHOLDS * value / 64),
}


def power_mean_scores(
    query: Tensor,
    key: Tensor,
    *,
    geometry: BlockGeometry,
    granularities: Sequence[Pooled | Sampled],
    scale: float,
    power: int,
    attn_mask: Tensor | None = None,
    mask: MaskSummary | None = None,
) -> Tensor:
    """`compute_mean_scores` with a power mean, over rows and granularities alike.

    A block counts for more where few of its rows attend to it much. Rows sum to 1.
    """
    size, found = geometry.block_size, []
    for granularity in granularities:
        if isinstance(granularity, Pooled):
            groups = (size // granularity.q, size // granularity.k)
            logits, counts = composite_logits(
                query, key, geometry=geometry, granularity=granularity, scale=scale, mask=mask
            )
        else:
            groups = (granularity.queries, size)
            logits, counts = sampled_logits(
                query,
                key,
                geometry=geometry,
                granularity=granularity,
                scale=scale,
                attn_mask=attn_mask,
            )
        part, total, share = row_masses(logits, counts, geometry, groups)
        found.append(((part / total) ** power * share).sum(-2).flatten(1, 2))
    return from_moments(torch.stack(found).mean(0), power)


def from_moments(moments: Tensor, power: int) -> Tensor:
    """Scores of which ``moments`` are means of powers: roots, a row of which sums to 1.

    Args:
        moments: [B, Hs, Nq, Nk].
        power: Of the power mean.

    Returns:
        [B, Hs, Nq, Nk]. A row stays 0 or NaN where it is.
    """
    scores = moments ** (1 / power)
    total = scores.sum(-1, keepdim=True)
    return scores / total.masked_fill(total == 0, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial(ForcesBlocks, Selector):
    """The mean of scores at up to two granularities, and a rule of `RULES`.

    Attributes:
        block_size: Tokens per block.
        c_q: Query rows per composite query; 0 for no composites.
        c_k: Keys per composite key.
        sampled_queries: Rows of a block that meet every key; 0 for none.
        power: Of the power mean over rows and granularities; 1 is the mean.
        rule: A name in `RULES`.
        value: Its number.
        sink_blocks: First key blocks, kept for every row.
        local_blocks: Diagonal block and those before it, kept for every row.
        last_query_blocks: Last query blocks, which keep every block.
    """

    block_size: int = 128
    c_q: int = 0
    c_k: int = 1
    sampled_queries: int = 0
    power: int = 1
    rule: str = "top_p"
    value: float = 0.95
    sink_blocks: int = 1
    local_blocks: int = 1
    last_query_blocks: int = 1

    def compute_selection(
        self,
        query: Tensor,
        key: Tensor,
        *,
        geometry: BlockGeometry,
        scale: float,
        attn_mask: Tensor | None,
    ) -> BlockSelection:
        """See `Selector.compute_selection`."""
        groups = {"c_q": self.c_q or self.block_size, "c_k": self.c_k}
        mask = summarize(attn_mask, geometry, **groups, device=query.device)
        granularities: list[Pooled | Sampled] = []
        if self.c_q:
            granularities.append(Pooled(q=self.c_q, k=self.c_k))
        if self.sampled_queries:
            granularities.append(Sampled(queries=self.sampled_queries))
        options: dict[str, Any] = {
            "geometry": geometry,
            "granularities": granularities,
            "scale": scale,
            "attn_mask": attn_mask,
            "mask": mask,
        }
        if self.power == 1:
            scores = compute_mean_scores(query, key, **options)
        else:
            scores = power_mean_scores(query, key, power=self.power, **options)
        rule = RULES[self.rule](self.value)
        return self.select_by(rule, scores, geometry=geometry, q_heads=query.shape[1], mask=mask)


# Composite queries and keys, and single rows.
GRANULARITIES: dict[str, dict[str, int]] = {
    "q8k8": {"c_q": 8, "c_k": 8},
    "q16k16s4": {"c_q": 16, "c_k": 16, "sampled_queries": 4},
    "q16k128s4": {"c_q": 16, "c_k": 128, "sampled_queries": 4},
    "q4k128s4": {"c_q": 4, "c_k": 128, "sampled_queries": 4},
    "q1k128s4": {"c_q": 1, "c_k": 128, "sampled_queries": 4},
    "q1k128s2": {"c_q": 1, "c_k": 128, "sampled_queries": 2},
    "q16k16s8": {"c_q": 16, "c_k": 16, "sampled_queries": 8},
    "s4": {"sampled_queries": 4},
    "oracle": {"sampled_queries": 128},
    # Blocks that few rows attend to much count for more.
    "oracle-rms": {"sampled_queries": 128, "power": 2},
    "q16k128s4-rms": {"c_q": 16, "c_k": 128, "sampled_queries": 4, "power": 2},
    "q16k128s16-rms": {"c_q": 16, "c_k": 128, "sampled_queries": 16, "power": 2},
    "q1k128s4-rms": {"c_q": 1, "c_k": 128, "sampled_queries": 4, "power": 2},
    "q1k16s4-rms": {"c_q": 1, "c_k": 16, "sampled_queries": 4, "power": 2},
    # The default's, without a last block of queries that keeps everything.
    "q16k16s4-no-last": {"c_q": 16, "c_k": 16, "sampled_queries": 4, "last_query_blocks": 0},
}
VALUES: dict[str, tuple[float, ...]] = {
    "top_p": (0.75, 0.85, 0.92, 0.96),
    "threshold": (0.016, 0.011, 0.008, 0.0055),
    "top_p_or_threshold": (0.016, 0.0095, 0.0065, 0.004),
    "mass_budget": (0.001, 0.0006, 0.00035, 0.0002),
    "even_share": (1.3, 0.9, 0.6, 0.4, 0.25),
}


def trials(granularity: str, rule: str) -> Callable[[int], list[Selector]]:
    """A sweep of one granularity and rule, for a block size."""

    def sweep(size: int) -> list[Selector]:
        fields = GRANULARITIES[granularity]
        fits = {name: min(value, size) for name, value in fields.items()}
        return [Trial(block_size=size, rule=rule, value=value, **fits) for value in VALUES[rule]]

    return sweep


def merged_heads(count: int) -> Callable[[int], list[Selector]]:
    """The default's sweep with composites over ``count`` heads, which then keep the same blocks."""

    return lambda size: [replace(selector, c_h=count) for selector in defaults(size)]


def rows_alike(size: int) -> list[Selector]:
    """The default's sweep with one threshold for all rows, however many blocks they see."""
    return [replace(selector, threshold_blocks=None) for selector in defaults(size)]


TRIALS: dict[str, Callable[[int], list[Selector]]] = {
    f"trial-{granularity}-{rule}": trials(granularity, rule)
    for granularity in GRANULARITIES
    for rule in RULES
}
TRIALS |= {f"trial-{count}-heads": merged_heads(count) for count in (2, 3, 4)}
TRIALS["trial-rows-alike"] = rows_alike
