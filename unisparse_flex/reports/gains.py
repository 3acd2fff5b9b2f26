"""What sparse attention gains: milliseconds of calls, and whether it pays on a prompt at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..nearly_all import NEARLY_ALL
from .attention_record import AttentionRecord, sparse_densities
from .density import BY_LENGTH, mean_density

# Of a ratio of times: less is nothing.
LEAST_GAIN = 0.01
# Share of the sparse calls' dense time from which calls that lose are nearly all of them.
NEARLY_ALL_LOSE = 0.9


def does_not_pay(calls: Sequence[AttentionRecord], rest_ms: float | None = None) -> bool:
    """Whether the model would rather stay dense on this prompt than leave layers of it dense.

    So it is where the sparse calls that are slower than dense take nearly all of the time, and
    where the others, without these, gain nothing that can be measured: of the whole prefill, where
    that is known.

    Args:
        calls: Of a forward pass.
        rest_ms: See `Explanation`.
    """
    sparse = [call for call in calls if call.decision == "sparse"]
    slower = slower_calls(sparse)
    if not slower:
        return False
    dense = [times[0] for call in sparse if (times := call.milliseconds) is not None]
    lost = [times[0] for call in slower if (times := call.milliseconds) is not None]
    if sum(lost) >= NEARLY_ALL_LOSE * sum(dense):
        return True
    others = [call for call in sparse if call not in slower]
    kept = mean_density(sparse_densities(others), left_dense=len(slower))
    left = [call if call not in slower else leave_dense(call) for call in calls]
    all_dense, without = whole_ms(left, rest_ms) or known_ms(left)
    return all_dense < (1.0 + LEAST_GAIN) * without or (kept is not None and kept >= NEARLY_ALL)


def leave_dense(call: AttentionRecord) -> AttentionRecord:
    """The call as it would be if settings kept it dense."""
    return replace(call, decision="dense", density=None)


def keeps_nearly_all(sparse: Sequence[AttentionRecord]) -> bool:
    """Whether sparse calls that choose their blocks drop next to none of them."""
    kept = [c.density for c in sparse if c.density is not None and not c.window]
    return bool(kept) and sum(kept) / len(kept) >= NEARLY_ALL


def slower_calls(sparse: Sequence[AttentionRecord]) -> list[AttentionRecord]:
    """The sparse calls that are faster dense, as measured or, at their density, predicted."""
    return [c for c in sparse if (times := c.milliseconds) is not None and times[1] > times[0]]


def faster_calls(calls: Sequence[AttentionRecord]) -> list[AttentionRecord]:
    """Those that stay dense for their length alone, and were measured to be faster sparse."""
    return [
        call
        for call in calls
        if call.reason in BY_LENGTH
        and call.measured is not None
        and (times := call.milliseconds) is not None
        and times[1] < times[0]
    ]


def known_ms(calls: Sequence[AttentionRecord]) -> tuple[float, float]:
    """Milliseconds of attention all dense, and as decided: as measured, else as predicted."""
    measured = [call for call in calls if call.measured is not None]
    return measured_ms(measured) if measured else predicted_ms(calls)


def measured_ms(calls: Sequence[AttentionRecord]) -> tuple[float, float]:
    """Measured milliseconds of the calls that were timed: all dense, and as decided."""
    known = [(call, call.measured) for call in calls if call.measured is not None]
    decided = (
        sparse if call.decision == "sparse" and sparse is not None else dense
        for call, (dense, sparse) in known
    )
    return sum(dense for _, (dense, _) in known), sum(decided)


def predicted_ms(calls: Sequence[AttentionRecord]) -> tuple[float, float]:
    """See `Explanation.predicted_ms`."""
    known = [(call, p) for call in calls if (p := call.prediction) is not None]
    dense = sum(p.dense_ms for _, p in known)
    return dense, sum(p.sparse_ms if c.decision == "sparse" else p.dense_ms for c, p in known)


def prefill_ms(
    calls: Sequence[AttentionRecord], rest_ms: float | None
) -> tuple[float, float] | None:
    """See `Explanation.prefill_ms`."""
    if not calls or rest_ms is None or any(call.prediction is None for call in calls):
        return None
    if max(call.q_len for call in calls) == 1:
        # A step of decoding.
        return None
    dense, decided = predicted_ms(calls)
    return dense + rest_ms, decided + rest_ms


def whole_ms(calls: Sequence[AttentionRecord], rest_ms: float | None) -> tuple[float, float] | None:
    """The whole prefill all dense, and as decided, with measured attention where it was timed.

    ``None`` where `prefill_ms` is, or only some of the calls were timed.
    """
    predicted = prefill_ms(calls, rest_ms)
    measured = [call for call in calls if call.measured is not None]
    if predicted is None or rest_ms is None or not measured:
        return predicted
    dense, decided = measured_ms(measured)
    return (dense + rest_ms, decided + rest_ms) if len(measured) == len(calls) else None


def is_nothing(ratio: float) -> bool:
    """Whether a dense time over that as decided is no gain that can be measured, and no loss."""
    return abs(ratio - 1.0) < LEAST_GAIN
