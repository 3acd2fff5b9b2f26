"""The word of ``min_length`` or of the cost model on one row of a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

from ...block_masks import Selector
from ...passes.decision import MOST_KEPT, CallShape, forecast
from .reasons import Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What a row must be to run sparse.

    Attributes:
        selectors: Those of the sparse layers, with the number of layers of each.
        min_length: Fewest keys; ``None`` asks the cost model.
        q_heads: Query heads of a layer on this rank.
        kv_heads: Key heads.
        head_dim: Of queries, keys and values.
        dtype: Of queries and cache.
        device: Where they are.
    """

    selectors: tuple[tuple[Selector, int], ...]
    min_length: int | None
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def count(selectors: Iterable[Selector]) -> tuple[tuple[Selector, int], ...]:
        """Selectors with how often each stands there."""
        return tuple(Counter(selectors).items())

    @property
    def min_queries(self) -> int:
        """Fewest queries of a sparse row: a block of every selector."""
        return max((selector.block_size for selector, _ in self.selectors), default=1)

    def decide(self, queries: int, length: int) -> Reason | None:
        """Why a row of so many queries and keys stays with the parent; ``None`` where it is sparse.

        All layers of a row are decided about together: they share the batch's split.
        """
        if self.min_length is not None:
            return None if length >= self.min_length else Reason.SHORT
        return _compare(self, queries, length)


@lru_cache(maxsize=4096)
def _compare(policy: Policy, queries: int, length: int) -> Reason | None:
    shape = CallShape(
        batch=1,
        q_heads=policy.q_heads,
        kv_heads=policy.kv_heads,
        q_len=queries,
        kv_len=length,
        head_dim=policy.head_dim,
        value_dim=policy.head_dim,
        is_causal=False,
        causal_lower_right=True,
        masked=False,
        dtype=policy.dtype,
        device=policy.device,
    )
    dense = sparse = kept = 0.0
    for selector, layers in policy.selectors:
        found = forecast(shape, selector)
        hosts = found.host_seconds
        dense += layers * max(found.dense_seconds + found.around_seconds, hosts[0])
        sparse += layers * max(found.sparse_seconds + found.around_seconds, hosts[1])
        kept += layers * found.density
    if sparse >= dense:
        return Reason.SLOWER
    most = MOST_KEPT * sum(layers for _, layers in policy.selectors)
    return None if kept < most else Reason.KEEPS_MOST
