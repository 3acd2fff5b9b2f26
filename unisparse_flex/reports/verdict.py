"""What `explain` makes of the calls in a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..command_line import CommandLine
from ..counted import counted
from ..passes.decision import say_reasons
from ..shares import say_share
from .attention_record import AttentionRecord, sparse_densities
from .density import LEFT_DENSE, mean_density
from .gains import (
    does_not_pay,
    faster_calls,
    is_nothing,
    keeps_nearly_all,
    known_ms,
    leave_dense,
    slower_calls,
    whole_ms,
)
from .kept_settings import setting
from .layers import excluded_layers, layer_index, name_layers
from .wording import Wording

PYTHON = Wording()
NO_GAIN, PREDICTED, MEASURED = "no gain", "predicted", "measured"
SAID_DIFFUSE = "attention is diffuse here, as it is in short prompts and with random weights"
# Most KL of the calibration that advice names.
KL_TO_BEAR = 0.01
# What `quality` says.
DIFFUSE_HERE = (
    f"{SAID_DIFFUSE}: under these settings it keeps nearly all blocks; "
    f"{CommandLine().write_calibrate(KL_TO_BEAR)} looks for others, within a loss that you state"
)
DOES_NOT_PAY = "sparse attention does not pay on this prompt, leave the model dense"
# After a prediction that may be far off.
FOREIGN = " (by another machine's rates)"
NO_CALL = "no attention call was seen: the model computes attention itself or with its own kernels"


def verdict(
    calls: Sequence[AttentionRecord],
    rest_ms: float | None = None,
    wording: Wording = PYTHON,
) -> str:
    """See `Explanation.verdict`."""
    if not calls:
        return NO_CALL
    sparse = [call for call in calls if call.decision == "sparse"]
    if not sparse:
        reasons = say_reasons(Counter(call.reason for call in calls))
        all_calls = f"all {len(calls)} calls stay" if len(calls) > 1 else "the only call stays"
        return f"{all_calls} dense{reasons}{_say_measured(calls)}"
    kept = mean_density(sparse_densities(sparse))
    share = "" if kept is None else _say_kept(kept, calls)
    windows = sum(call.window for call in sparse)
    verb = "keeps" if windows == 1 else "keep"
    whole_windows = f" ({windows} {verb} a whole window)" if windows else ""
    parts = [f"{len(sparse)} of {counted(len(calls), 'call')} sparse{whole_windows}{share}"]
    if keeps_nearly_all(sparse):
        return f"{parts[0]}: nothing is gained{_say_measured(calls)}"
    known = MEASURED if any(call.measured is not None for call in calls) else PREDICTED
    dense_ms, decided_ms = known_ms(calls)
    if decided_ms:
        gain = _say_gain(dense_ms / decided_ms)
        whole = whole_ms(calls, rest_ms)
        of_whole = None if whole is None else _say_gain(whole[0] / whole[1])
        if gain == NO_GAIN and of_whole in (None, NO_GAIN):
            parts[0] += f", {NO_GAIN} {known}"
        else:
            parts[0] += f", attention {known} {gain}"
            parts[0] += "" if of_whole is None else f", the whole prefill {of_whole}"
        if known == PREDICTED and any(c.prediction and c.prediction.is_foreign for c in calls):
            parts[0] += FOREIGN
    slower = slower_calls(sparse)
    if does_not_pay(calls, rest_ms):
        every = len(slower) == len(sparse)
        start = "every sparse call is" if every else f"{len(slower)} of them"
        end = "" if every else ", and the others gain too little"
        parts.append(f"{start} {known} slower than dense{end}: {DOES_NOT_PAY}")
    elif indices := _slower_layers(sparse):
        density = [c.density or 0.0 for c in slower if layer_index(c) in indices]
        verb = "keeps" if len(indices) == 1 else "keep"
        parts.append(
            f"{name_layers(indices)} {verb} {say_share(sum(density) / len(density))}: leave "
            f"{'it' if len(indices) == 1 else 'them'} dense "
            f"({setting(calls, wording, 'dense_layers', layers_to_leave_dense(calls, rest_ms))})"
            f"{_say_without(calls, indices, rest_ms)}"
        )
    elif slower:
        parts.append(f"{len(slower)} of them {known} slower than dense: calibrate, or set top_k")
    return "; ".join(parts) + _say_measured(calls)


def _say_without(
    calls: Sequence[AttentionRecord], indices: Sequence[int], rest_ms: float | None
) -> str:
    """What is gained once these layers are dense: by the whole prefill, where that is known."""
    left = [leave_dense(call) if layer_index(call) in indices else call for call in calls]
    whole = whole_ms(left, rest_ms)
    dense_ms, decided_ms = whole or known_ms(left)
    what = "attention" if whole is None else "a whole prefill"
    return f", for {what} {_say_gain(dense_ms / decided_ms)}" if decided_ms else ""


def _say_kept(kept: float, calls: Sequence[AttentionRecord]) -> str:
    """The share of the sparse calls' blocks, and of all where others could be sparse but are not.

    Of dense calls under a mask nobody knows here whether they would keep a whole window.
    """
    left = [call for call in calls if call.reason in LEFT_DENSE and call.prediction is not None]
    if not left:
        return f", {say_share(kept)} of blocks"
    said = f", {say_share(kept)} of their blocks"
    every = mean_density(sparse_densities(calls), left_dense=len(left))
    if every is None or any(call.masked for call in left):
        return said
    return f"{said} ({say_share(every)} of all)"


def _say_measured(calls: Sequence[AttentionRecord]) -> str:
    """How many calls stay dense that were measured to be faster sparse; empty where none was."""
    faster = faster_calls(calls)
    if not faster:
        return ""
    verb = "was" if len(faster) == 1 else "were"
    return f"; {len(faster)} of the dense calls {verb} measured faster sparse"


def _say_gain(ratio: float) -> str:
    """Dense time over that as decided, in words."""
    if is_nothing(ratio):
        return NO_GAIN
    return f"{ratio:.3g}x as fast" if ratio > 1.0 else f"{1 / ratio:.3g} times as long"


def layers_to_leave_dense(
    calls: Sequence[AttentionRecord], rest_ms: float | None = None
) -> list[int]:
    """What the verdict gives as ``dense_layers``, excluded layers among it; empty for no advice."""
    sparse = [call for call in calls if call.decision == "sparse"]
    if keeps_nearly_all(sparse) or does_not_pay(calls, rest_ms):
        return []
    indices = _slower_layers(sparse)
    return sorted({*indices, *excluded_layers(calls)}) if indices else []


def _slower_layers(sparse: Sequence[AttentionRecord]) -> list[int]:
    """Indices of which every sparse call is slower."""
    slower = slower_calls(sparse)
    faster = {layer_index(call) for call in sparse if call not in slower}
    return sorted({i for call in slower if (i := layer_index(call)) is not None} - faster)
