"""How many of the blocks that they see the attention calls of a model read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ..block_masks import BlockSelection
from ..passes import DenseReason, SparseConfig, observe_calls
from ..passes.attend import call_geometry, keeps_window, read_call
from ..passes.calls import SdpaCall
from ..passes.decision import refuse
from ..reports import LEFT_DENSE, AttentionRecord, mean_density, record_attention, sparse_densities


@dataclass(kw_only=True, slots=True, eq=False)
class ReadBlocks:
    """The attention calls of a model, and how much of what they see they read.

    Attributes:
        records: One for each call.
        left_dense: How many calls could be sparse, but for the settings or because dense is
            predicted to be faster; without those that see a narrow window.
    """

    records: list[AttentionRecord]
    left_dense: int = 0

    @property
    def sparse(self) -> list[AttentionRecord]:
        """The calls that ran sparse."""
        return [record for record in self.records if record.density is not None]

    @property
    def windows(self) -> int:
        """How many sparse calls keep a whole sliding window."""
        return sum(record.window for record in self.sparse)

    @property
    def density(self) -> float | None:
        """See `mean_density`; ``None`` where no call ran sparse."""
        return mean_density(sparse_densities(self.records), self.left_dense)

    @property
    def sparse_density(self) -> float | None:
        """`density` over the sparse calls alone."""
        return mean_density(sparse_densities(self.records))


@contextmanager
def watch_blocks(model: nn.Module) -> Iterator[ReadBlocks]:
    """Records the attention calls that a model makes inside, as they run compiled."""
    with record_attention(model, as_compiled=True) as records:
        found = ReadBlocks(records=records)

        def see(
            call: SdpaCall,
            config: SparseConfig,
            _: BlockSelection | None,
            reason: DenseReason | None,
        ) -> None:
            if reason in LEFT_DENSE:
                found.left_dense += _could_choose(call, config)

        with observe_calls(see, as_compiled=True):
            yield found


def _could_choose(call: SdpaCall, config: SparseConfig) -> bool:
    """Whether a call that stays dense could be sparse, and not keep all of a narrow window."""
    free = SparseConfig.of_model(config.selector, min_length=0)
    # Nobody has read the mask of a call whose layer is excluded.
    call, _ = read_call(call, free, everywhere=True) or (call, [])
    return refuse(call, free) is None and not keeps_window(call_geometry(call, free))
