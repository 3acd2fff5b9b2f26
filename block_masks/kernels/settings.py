"""What the kernels are told beside tensors and lengths."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..geometry import BlockGeometry
from ..selection import (
    ForcedBlocks,
    HeadThreshold,
    SelectionRule,
    Threshold,
    TopK,
    TopP,
    TopPOrThreshold,
)

if TYPE_CHECKING:
    from ..selectors import UniSparse


class KernelSettings(NamedTuple):
    """What does not change from call to call; the operator takes it as text, in one argument.

    Attributes:
        block_size: Tokens per block.
        c_q: Query rows per composite query; 0 for no composite scores.
        c_k: Keys per composite key.
        c_h: Consecutive query heads per composite head.
        sampled_queries: Rows of a block that meet every key; 0 for none.
        rule: Which blocks are kept: ``top_p``, ``top_k``, ``threshold`` or ``top_p_or_threshold``.
        values: Its number; the threshold of ``top_p_or_threshold``, else 0; the blocks of a row for
            which a threshold is stated, 0 for all rows alike. Trailing zeros may be left out.
        sink_blocks: See `ForcedBlocks`.
        local_blocks: See `ForcedBlocks`.
        last_query_blocks: See `ForcedBlocks`.
        head_thresholds: Of every query head, instead of the threshold in ``values``; empty where
            all have that.
    """

    block_size: int
    c_q: int
    c_k: int
    c_h: int
    sampled_queries: int
    rule: str
    values: tuple[float, ...]
    sink_blocks: int
    local_blocks: int
    last_query_blocks: int
    head_thresholds: tuple[float, ...] = ()

    @property
    def forced_blocks(self) -> ForcedBlocks:
        """Blocks kept in any case."""
        return ForcedBlocks.of(self)

    @property
    def sample_step(self) -> int:
        """Of so many query rows the last meets every key; 0 for none."""
        return self.block_size // self.sampled_queries if self.sampled_queries else 0

    def of_part(self, geometry: BlockGeometry) -> KernelSettings:
        """Those of a part of a call, for what does not know of the rows after it."""
        if not geometry.is_part:
            return self
        left = self.forced_blocks.of_part(geometry).last_query_blocks
        return self._replace(last_query_blocks=left)


def settings_of(selector: UniSparse) -> KernelSettings:
    """The kernels' settings of a selector.

    Raises:
        TypeError: The kernels have no such rule.
    """
    rule = selector.rule
    name, values = spell(rule)
    return KernelSettings(
        selector.block_size,
        selector.c_q,
        selector.c_k,
        selector.c_h,
        selector.sampled_queries,
        name,
        values,
        selector.sink_blocks,
        selector.local_blocks,
        selector.last_query_blocks,
        rule.thresholds if isinstance(rule, HeadThreshold) else (),
    )


def spell(rule: SelectionRule) -> tuple[str, tuple[float, ...]]:
    """A rule as the kernels take it: its name and its numbers, without those of heads.

    Raises:
        TypeError: The kernels have no such rule.
    """
    if isinstance(rule, TopP):
        return "top_p", (rule.top_p,)
    if isinstance(rule, TopK):
        return "top_k", (float(rule.top_k),)
    if isinstance(rule, Threshold):
        return "threshold", (rule.threshold, 0.0, float(rule.threshold_blocks or 0))
    if isinstance(rule, TopPOrThreshold):
        blocks = float(rule.threshold_blocks or 0)
        return "top_p_or_threshold", (rule.top_p, rule.threshold, blocks)
    if isinstance(rule, HeadThreshold):
        blocks = float(rule.threshold_blocks or 0)
        if rule.top_p is None:
            return "threshold", (0.0, 0.0, blocks)
        return "top_p_or_threshold", (rule.top_p, 0.0, blocks)
    raise TypeError(
        "rule must be TopP, TopK, Threshold, TopPOrThreshold or HeadThreshold, got "
        + type(rule).__name__
    )


@torch.compiler.assume_constant_result
def encode_settings(*settings: Any) -> str:
    """The fields of `KernelSettings`, in their order, as text; a constant of any graph."""
    # A symbolic count is fixed by being written.
    return json.dumps(KernelSettings(*settings), default=int)


@lru_cache(maxsize=256)
def decode_settings(text: str) -> KernelSettings:
    """What `encode_settings` was given."""
    settings = KernelSettings(*json.loads(text))
    return settings._replace(
        values=tuple(settings.values), head_thresholds=tuple(settings.head_thresholds)
    )
