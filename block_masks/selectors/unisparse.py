"""UniSparse: composite tokens, block scores, top-p (arXiv 2512.14082).

The paper publishes the policy, not its constants: those of `UniSparse.paper` are a reconstruction.
``sampled_queries`` and ``threshold`` go beyond it, and are part of the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .. import kernels
from ..block_selection import BlockSelection
from ..geometry import BlockGeometry
from ..granularity import CompositeKeys, Pooled, Sampled, validate_merged_heads
from ..mask_summary import summarize
from ..scoring import compute_block_scores, compute_mean_scores
from ..selection import HeadThreshold, SelectionRule, Threshold, TopK, TopP, TopPOrThreshold
from ..selection_cost import LENGTH_POWER, SelectionCost, top_p_share
from ..validation import validate_block_size, validate_int
from .base import ForcesBlocks, Selector

# The defaults, chosen on real models, see docs/selectors.md: exact rows find single keys that
# matter, composites see every row; a threshold spends blocks where they hold most, above a mass for
# every row, and falls with the blocks that a row sees: how a prompt's beginning is read hardly
# shows at its end.
BLOCK_SIZE, C_Q = 128, 16
THRESHOLD, THRESHOLD_BLOCKS = 0.006, 64
# A row may drop so many thresholds of mass before blocks under the threshold are kept too.
DROPPED_THRESHOLDS = 12


def default_top_p(threshold: float) -> float:
    """The ``top_p`` that goes with another threshold than the default one."""
    return round(1 - DROPPED_THRESHOLDS * threshold, 4)


DEFAULT_RULE = {
    "top_p": default_top_p(THRESHOLD),
    "threshold": THRESHOLD,
    "threshold_blocks": THRESHOLD_BLOCKS,
}
RULES = ("top_p", "top_k", "threshold", "head_thresholds", "threshold_blocks")
NO_RULE = dict.fromkeys(RULES)
PAPER: dict[str, Any] = {"c_q": 8, "c_k": 8, "sampled_queries": 0, "top_p": 0.95}


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class UniSparse(ForcesBlocks, Selector):
    """Blocks by a threshold, a mass (top-p) or a number (top-k), scored by two granularities.

    Without arguments it is what `optimize` takes by default. To keep more or fewer blocks, name a
    quality there (`selector_of_quality`) rather than fields here. Printed, it shows the fields that
    differ from the defaults.

    Attributes:
        block_size: Tokens per block; a power of two of at least 16.
        c_q: Query rows per composite query; divides ``block_size``. By default 16.
        c_k: Keys per composite key; divides ``block_size``, which it is by default.
        c_h: Consecutive query heads of one GQA group per composite head; divides the group.
        top_p: Share of a row's estimated attention mass to keep, in (0, 1]; 1.0 keeps all.
            Where no rule is given: ``top_p=0.928, threshold=0.006, threshold_blocks=64``.
        top_k: Blocks per row instead of ``top_p``, forced ones counted first.
        threshold: Least share of a row's estimated mass, in (0, 1], instead of ``top_p``; with
            both, blocks that either keeps. A row that would keep nothing keeps its highest.
        threshold_blocks: Visible blocks of a row for which the threshold is stated: a row of n has
            it times ``sqrt(threshold_blocks / n)``. The end of a prompt then costs less for the
            same quality, its beginning is read less exactly. ``None``: all rows alike.
        head_thresholds: A threshold for each query head, in [0, 1], instead of ``threshold``; 0
            keeps every block. Needs ``c_h`` 1.
        sampled_queries: Rows of a block that meet every key exactly, the last of them included;
            their scores and those of the composite tokens are averaged. Divides ``block_size``; 0
            for none.
        sink_blocks: First key blocks, kept for every row.
        local_blocks: Diagonal block and those before it, kept for every row.
        last_query_blocks: Last query blocks, which keep every block.
    """

    block_size: int = BLOCK_SIZE
    # Numbers once it is made.
    c_q: int = None  # type: ignore[assignment]
    c_k: int = None  # type: ignore[assignment]
    c_h: int = 1
    top_p: float | None = None
    top_k: int | None = None
    threshold: float | None = None
    sampled_queries: int = 4
    sink_blocks: int = 1
    local_blocks: int = 1
    last_query_blocks: int = 1
    head_thresholds: tuple[float, ...] | None = None
    threshold_blocks: int | None = None

    row_independent = True

    def __post_init__(self) -> None:
        validate_block_size(self.block_size)
        for name, size in self._default_composites().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, size)
        for name in ("c_q", "c_k", "c_h"):
            validate_int(getattr(self, name), name, minimum=1)
        for name in ("c_q", "c_k"):
            if self.block_size % getattr(self, name):
                raise ValueError(
                    f"{name} must divide block_size {self.block_size}, got {getattr(self, name)}; "
                    "use a power of two up to block_size"
                )
        validate_int(self.sampled_queries, "sampled_queries", minimum=0)
        if self.sampled_queries and self.block_size % self.sampled_queries:
            raise ValueError(
                f"sampled_queries must divide block_size {self.block_size}, got "
                f"{self.sampled_queries}; use 0 or a power of two up to block_size"
            )
        names = ("top_p", "top_k", "threshold", "head_thresholds")
        rules = [n for n in names if getattr(self, n) is not None]
        if len(rules) > 1 and self.top_k is not None:
            given = " and ".join(f"{name}={getattr(self, name)}" for name in rules)
            raise ValueError(
                f"top_k must not be given with top_p or threshold, got {given}; leave it None, or "
                "leave them None"
            )
        self._validate_head_thresholds()
        if self.threshold_blocks is not None and not self._thresholds:
            raise ValueError(
                "threshold_blocks must be given with threshold or head_thresholds, got "
                f"{self.threshold_blocks} alone; give one of them, or leave it None"
            )
        if not rules:
            for name, value in DEFAULT_RULE.items():
                object.__setattr__(self, name, value)
        # Built here so that a wrong value is reported where it was given.
        _ = self.rule, self.forced_blocks
        Selector.__post_init__(self)

    @classmethod
    def paper(cls, **changes: Any) -> UniSparse:
        """The paper's policy: composite tokens of 8 queries and 8 keys, top-p 0.95.

        Args:
            changes: Fields that are to differ; a ``top_k`` or ``threshold`` replaces
                ``top_p``.
        """
        own = dict(PAPER)
        if any(changes.get(name) is not None for name in ("top_k", "threshold", "head_thresholds")):
            del own["top_p"]
        return cls(**{**own, **changes})

    def __repr__(self) -> str:
        return self.text

    def _default_composites(self) -> dict[str, int]:
        return {"c_q": min(C_Q, self.block_size), "c_k": self.block_size}

    def _shown(self) -> dict[str, Any]:
        """See `Selector._shown`: what differs from the defaults."""
        plain = {field.name: field.default for field in fields(self)} | self._default_composites()
        shown = {n: v for n, v in self._values().items() if v != plain[n]}
        if {name: getattr(self, name) for name in RULES} == {**NO_RULE, **DEFAULT_RULE}:
            shown = {name: value for name, value in shown.items() if name not in RULES}
        return shown

    def _validate_head_thresholds(self) -> None:
        if self.head_thresholds is None:
            return
        if not isinstance(self.head_thresholds, tuple) or not self.head_thresholds:
            raise TypeError(
                "head_thresholds must be a tuple with a number for each query head, got "
                f"{self.head_thresholds!r}"
            )
        if self.threshold is not None or self.c_h != 1:
            raise ValueError(
                "head_thresholds must be given without threshold and with c_h=1, got "
                f"threshold={self.threshold} and c_h={self.c_h}; leave them at their defaults"
            )

    @property
    def rule(self) -> SelectionRule:
        """The rule that ``top_p``, ``top_k`` and the thresholds ask for."""
        if self.head_thresholds is not None:
            return HeadThreshold(
                thresholds=self.head_thresholds,
                top_p=self.top_p,
                threshold_blocks=self.threshold_blocks,
            )
        if self.top_k is not None:
            return TopK(top_k=self.top_k)
        if self.threshold is not None and self.top_p is not None:
            return TopPOrThreshold(
                top_p=self.top_p,
                threshold=self.threshold,
                threshold_blocks=self.threshold_blocks,
            )
        if self.threshold is not None:
            return Threshold(threshold=self.threshold, threshold_blocks=self.threshold_blocks)
        assert self.top_p is not None
        return TopP(top_p=self.top_p)

    @property
    def granularity(self) -> Pooled:
        """How queries, keys and heads are pooled."""
        return Pooled(q=self.c_q, k=self.c_k, heads=self.c_h)

    @property
    def cost(self) -> SelectionCost:
        """Composite sizes and the density to expect; densities are those of SmolLM2-135M."""
        forced = self.sink_blocks + self.local_blocks
        return SelectionCost(
            c_q=self.c_q,
            c_k=self.c_k,
            c_h=self.c_h,
            sampled_queries=self.sampled_queries,
            has_kernels=True,
            row_blocks=forced if self.top_k is None else max(forced, self.top_k),
            last_query_blocks=self.last_query_blocks,
            share=0.0 if self.top_p is None else top_p_share(self.top_p),
            share_power=LENGTH_POWER,
            thresholds=self._thresholds,
            threshold_blocks=self.threshold_blocks,
        )

    @property
    def _thresholds(self) -> tuple[float, ...]:
        if self.head_thresholds is not None:
            return self.head_thresholds
        return () if self.threshold is None else (self.threshold,)

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
        validate_merged_heads(query.shape[1], key.shape[1], self.c_h)
        obstacle = self.kernel_obstacle(
            query, key, geometry=geometry, scale=scale, attn_mask=attn_mask
        )
        if obstacle is None:
            return self._select_by_kernels(query, key, geometry=geometry, scale=scale)
        mask = summarize(attn_mask, geometry, c_q=self.c_q, c_k=self.c_k, device=query.device)
        granularities: list[Pooled | Sampled] = [self.granularity]
        if self.sampled_queries:
            granularities.append(Sampled(queries=self.sampled_queries, heads=self.c_h))
        scores = compute_mean_scores(
            query,
            key,
            geometry=geometry,
            granularities=granularities,
            scale=scale,
            attn_mask=attn_mask,
            mask=mask,
        )
        return self.select_by(
            self.rule, scores, geometry=geometry, q_heads=query.shape[1], mask=mask
        )

    def kernel_obstacle(
        self,
        query: Tensor,
        key: Tensor,
        *,
        geometry: BlockGeometry,
        scale: float,
        attn_mask: Tensor | None,
    ) -> str | None:
        """See `Selector.kernel_obstacle`."""
        if attn_mask is not None:
            return "the mask is a tensor of pairs, no proved formula"
        return kernels.obstacle(query, key, geometry, scale)

    def prepare_mask(
        self, query: Tensor, key: Tensor, *, geometry: BlockGeometry, scale: float
    ) -> list[Tensor]:
        """See `Selector.prepare_mask`: tables for the kernels, where these select."""
        obstacle = self.kernel_obstacle(query, key, geometry=geometry, scale=scale, attn_mask=None)
        if obstacle is not None:
            return []
        return kernels.prepare_mask(
            kernels.settings_of(self), geometry, query.shape[0], query.device
        )

    def _select_by_kernels(
        self,
        query: Tensor,
        key: Tensor,
        *,
        geometry: BlockGeometry,
        scale: float,
        are_composites: bool = False,
    ) -> BlockSelection:
        lists = kernels.select_lists(
            query,
            key,
            kernels.settings_of(self),
            geometry=geometry,
            scale=scale,
            are_composites=are_composites,
        )
        visible, _ = geometry.block_bounds(query.device)
        return BlockSelection(keep=lists.kept(), visible=visible, geometry=geometry, lists=lists)

    @property
    def keys_per_composite(self) -> int | None:
        """See `Selector.keys_per_composite`: sampled queries meet every key."""
        return None if self.sampled_queries else self.c_k

    def pool_keys(self, key: Tensor, *, blocks: int) -> Tensor:
        """See `Selector.pool_keys`; by the kernels, and then in key's dtype, where these select."""
        if kernels.supports_keys(key):
            return kernels.pool_keys(key, c_k=self.c_k, block_size=self.block_size, blocks=blocks)
        return Selector.pool_keys(self, key, blocks=blocks)

    def select_from_composites(
        self, query: Tensor, keys: CompositeKeys, *, geometry: BlockGeometry, scale: float
    ) -> BlockSelection:
        """See `Selector.select_from_composites`."""
        if self.sampled_queries:
            return Selector.select_from_composites(
                self, query, keys, geometry=geometry, scale=scale
            )
        validate_merged_heads(query.shape[1], keys.tokens.shape[1], self.c_h)
        obstacle = self.kernel_obstacle(
            query, keys.tokens, geometry=geometry, scale=scale, attn_mask=None
        )
        if obstacle is None:
            return self._select_by_kernels(
                query, keys.tokens, geometry=geometry, scale=scale, are_composites=True
            )
        scores = compute_block_scores(
            query, keys, geometry=geometry, granularity=self.granularity, scale=scale
        )
        return self.select_by(self.rule, scores, geometry=geometry, q_heads=query.shape[1])


DEFAULT_SELECTOR = UniSparse()
