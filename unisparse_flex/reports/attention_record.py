"""What `explain` says of one attention call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..passes import DenseReason, SparseConfig
from ..passes.decision import CallForecast
from .density import BY_COST


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionRecord:
    """One attention call of one forward pass.

    Attributes:
        layer: Name of the module that made the call.
        q_len: Query rows, or 0 where the call does not say.
        kv_len: Keys, or 0.
        heads: Query and key heads, such as ``"9/3"``.
        masked: Whether the call carries a mask that stays a tensor: none that was read.
        decision: ``"sparse"`` or ``"dense"``.
        reason: Why it stays dense; ``None`` where it runs sparse.
        density: Kept over visible blocks in [0, 1]; ``None`` where it stays dense.
        window: Whether it keeps all of a sliding window of so few blocks, without a choice.
        unjudged: Query blocks, counted in every head, that keep all they see because they hold or
            see a NaN or an infinity.
        plain_selection: Why PyTorch code selects its blocks instead of GPU kernels; ``None`` where
            kernels do, where there is no GPU, or where it stays dense.
        own_kernel: Why FlexAttention's own kernel attends instead of FlashAttention-4; ``None``
            where that does or was not to be used, where there is no GPU, or where it stays dense.
        prediction: Milliseconds and break-even length by the cost model; ``None`` where it says
            nothing: no settings, or no block-sparse kernel for the call.
        measured: Milliseconds dense and sparse, where the call was timed; ``None`` in the second
            where no block-sparse kernel takes it.
        config: The settings of the call; ``None`` where it has none.
        sparser: Of a call at ``"high"`` or ``"balanced"`` that stays dense because that is
            predicted to be faster, the next quality that keeps fewer blocks and may make it
            sparse, and the fewest keys, in whole blocks, from which it would; ``None`` of others,
            and where none would.
        lacks_mask_kernel: Whether a mask that is a tensor, such as padding, is all that keeps a
            sparse kernel from it: on a CPU none reads one.
    """

    layer: str
    q_len: int = 0
    kv_len: int = 0
    heads: str = ""
    masked: bool = False
    decision: str
    reason: DenseReason | None = None
    density: float | None = None
    window: bool = False
    unjudged: int = 0
    plain_selection: str | None = None
    own_kernel: str | None = None
    prediction: CallForecast | None = None
    measured: tuple[float, float | None] | None = None
    config: SparseConfig | None = field(default=None, repr=False)
    sparser: tuple[str, int] | None = None
    lacks_mask_kernel: bool = False

    @property
    def milliseconds(self) -> tuple[float, float] | None:
        """Dense and sparse: as measured, where the call was timed, else as predicted."""
        if self.measured is not None:
            dense, sparse = self.measured
            return None if sparse is None else (dense, sparse)
        p = self.prediction
        return None if p is None else (p.dense_ms, p.sparse_ms)

    @property
    def is_excluded(self) -> bool:
        """Whether settings keep it dense: nothing is known then of what it would keep sparse."""
        return self.reason is DenseReason.EXCLUDED

    @property
    def may_differ_compiled(self) -> bool:
        """Whether proving what the mask is could change the decision or the density."""
        return self.masked and self.reason in (None, *BY_COST, DenseReason.NO_KERNEL)


def fill_blocks(tokens: int, block_size: int) -> int:
    """So many tokens and those that fill their last block, which is computed whole."""
    return -(-tokens // block_size) * block_size


def sparse_densities(records: Iterable[AttentionRecord]) -> list[tuple[float, bool]]:
    """What `mean_density` takes of the sparse calls."""
    return [(record.density, record.window) for record in records if record.density is not None]
