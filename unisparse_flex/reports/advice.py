"""What `explain` says to do next, by what the calls do and the settings that they have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import itemgetter

from ..counted import counted
from ..passes import DenseReason
from ..shares import say_share
from .attention_record import AttentionRecord, fill_blocks, sparse_densities
from .density import BY_COST, BY_LENGTH, mean_density
from .gains import does_not_pay, faster_calls, keeps_nearly_all, slower_calls
from .kept_settings import quality_of, setting
from .layers import layer_index, name_layers
from .verdict import (
    KL_TO_BEAR,
    MEASURED,
    PREDICTED,
    PYTHON,
    SAID_DIFFUSE,
    layers_to_leave_dense,
)
from .wording import Wording, name_runs, runs_of

# Each quality, and the next that keeps fewer blocks.
SPARSER: dict[str | None, str] = {"high": "balanced", "balanced": "fast"}
# Density from which attention is called diffuse.
DIFFUSE = 0.9
# From here on no setting of the dial keeps much less.
ALL = 0.99
NO_CALL_STEP = "load models of Hugging Face with attn_implementation='sdpa'; others must call SDPA"
LONGER_MAY = "a longer prompt may keep a smaller share"
COMPILED = "torch.compile(model), if it is not compiled: the times are of that"
COMMANDS = "{speed} times it compiled, {quality} says what it changes in what the model predicts"
PADDING = (
    "padding, or another mask that is a tensor, {does}: no sparse CPU kernel reads it; run prompts "
    "of one length, or {way_out}"
)
# By the reason that most calls stay dense for.
NEXT_STEPS = {
    DenseReason.NOT_OPTIMIZED: "model = unisparse_flex.optimize(model), then explain it again",
    DenseReason.SHORT: (
        "lower {min_length}, or leave it out: then the cost model decides for each call"
    ),
    DenseReason.FEW_QUERIES: (
        "explain a whole prompt: steps of a few queries, such as decoding, stay dense"
    ),
    DenseReason.NO_KERNEL: (
        "run unisparse-flex doctor, which says what kernels this machine has and why not others"
    ),
    DenseReason.EXCLUDED: "leave layers out of {dense_layers}",
}
ALL_CALIBRATED_DENSE = (
    "every layer is dense by the calibration: calibrate anew, for a larger kl (or a smaller recall)"
)
SAID_COMPILED = "compare its time and its output with the dense model's"


def next_step(
    calls: Sequence[AttentionRecord], rest_ms: float | None = None, wording: Wording = PYTHON
) -> str:
    """See `Explanation.next_step`."""
    if not calls:
        return NO_CALL_STEP
    sparse = [call for call in calls if call.decision == "sparse"]
    if not sparse:
        return _where_all_is_dense(calls, wording)
    if all(call.lacks_mask_kernel for call in sparse):
        return PADDING.format(
            does="makes sparse calls slower than dense ones",
            way_out=f"leave out {wording.name_of_min_length}",
        )
    excluded = [call for call in calls if call.is_excluded]
    if keeps_nearly_all(sparse):
        if excluded:
            return _where_others_are_excluded(sparse, excluded, wording)
        return _where_nearly_all_is_kept(sparse, wording)
    if does_not_pay(calls, rest_ms):
        step = _where_nothing_is_gained(calls, wording)
        looked = not excluded or wording.calibrated
        return step if looked else f"{step}; {_say_not_looked_at(excluded, wording)} to look"
    fewer = SPARSER.get(_quality_in_force(sparse))
    line, step = wording.command_line, COMPILED
    if line is not None:
        layers = layers_to_leave_dense(calls, rest_ms)
        given = {"dense_layers": name_runs(runs_of(layers), ",")} if layers else {}
        speed, quality = (line.write(command, **given) for command in ("speed", "quality"))
        step = COMMANDS.format(speed=speed, quality=quality)
    elif wording.compiled:
        step = SAID_COMPILED
    if fewer is None:
        return step
    return f"{step}; {setting(calls, wording, 'quality', fewer)} keeps fewer blocks"


def _where_nearly_all_is_kept(calls: Sequence[AttentionRecord], wording: Wording) -> str:
    """Of sparse calls that drop next to nothing, whatever the quality."""
    if _quality_in_force(calls) is not None:
        step = f"leave the model dense: {SAID_DIFFUSE}, so that nearly all blocks are kept"
    else:
        step = (
            "give the selector a smaller budget where that is what keeps nearly all blocks; else "
            f"leave the model dense: {SAID_DIFFUSE}"
        )
    step += _or_bear_a_loss(wording)
    later = _longer(calls)
    return f"{step}; a longer prompt may differ, from {later} keys on" if later else step


def _where_others_are_excluded(
    sparse: Sequence[AttentionRecord], excluded: Sequence[AttentionRecord], wording: Wording
) -> str:
    """Of sparse calls that drop next to nothing, beside some that settings keep dense."""
    one = len({call.layer for call in sparse}) == 1
    start = "the sparse layer keeps nearly all of its blocks"
    if not one:
        start = "the sparse layers keep nearly all of their blocks"
    if _quality_in_force(sparse) is not None:
        start += ": attention is diffuse there"
    count = len({call.layer for call in excluded})
    if wording.calibrated:
        verb = "is" if count == 1 else "are"
        return (
            f"{start}; {count} {verb} dense by the calibration: ask for a larger kl (or a smaller "
            "recall)"
        )
    not_looked_at = _say_not_looked_at(excluded, wording)
    return f"{start}; {not_looked_at} to look, or the model dense{_or_bear_a_loss(wording)}"


def _say_not_looked_at(excluded: Sequence[AttentionRecord], wording: Wording) -> str:
    """That nothing is known of layers that settings keep dense, and how to change that."""
    count = len({call.layer for call in excluded})
    indices = sorted({i for call in excluded if (i := layer_index(call)) is not None})
    layers = name_layers(indices) if len(indices) == count else counted(count, "layer")
    verb, them = ("was", "it") if count == 1 else ("were", "some")
    return f"{layers} {verb} not looked at: leave {them} out of {wording.name_of_dense_layers}"


def _or_bear_a_loss(wording: Wording) -> str:
    """What drops more of attention that is diffuse, after a step that leaves it dense."""
    if wording.calibrated:
        return "; or calibrate anew, for a larger kl"
    return f"; or state a loss to bear: {wording.calibrate(KL_TO_BEAR)}"


def _where_nothing_is_gained(calls: Sequence[AttentionRecord], wording: Wording) -> str:
    """Where sparse attention does not pay, by the calls that are slower than dense."""
    slower = slower_calls([call for call in calls if call.decision == "sparse"])
    quality, share = _quality_in_force(slower), mean_density(sparse_densities(slower)) or 0.0
    if share >= DIFFUSE and quality == "fast":
        return (
            f"leave the model dense: {SAID_DIFFUSE}, so that even {wording.quality('fast')} keeps "
            f"{say_share(share)} of the blocks{_or_bear_a_loss(wording)}"
        )
    if all(call.measured and _is_predicted_faster(call) for call in slower):
        return (
            "leave the model dense at this length: the cost model is wrong here; "
            "unisparse-flex doctor --measure gives it this machine's rates"
        )
    if all(_is_expected_faster(call) for call in slower):
        start = "the slower calls keep more blocks than is expected of the selector"
        if share >= DIFFUSE:
            start += f" ({SAID_DIFFUSE})"
        if quality == "fast" or share >= ALL:
            diffuse = share >= DIFFUSE
            return f"{start}: leave the model dense{_or_bear_a_loss(wording) if diffuse else ''}"
        if quality in SPARSER:
            fast = setting(calls, wording, "quality", "fast")
            return f"{start}: {fast} keeps fewer, {LONGER_MAY}; or leave the model dense"
        if wording.calibrated:
            return f"{start}: calibrate anew, for a larger kl; or leave the model dense"
        return f"{start}: give it a smaller budget, {LONGER_MAY}; or leave the model dense"
    start = (
        f"calls are sparse because of {wording.name_of_min_length}: dense is "
        f"{_known(slower)} faster at this length; without it the cost model decides"
    )
    if quality in SPARSER:
        start += f"; {setting(calls, wording, 'quality', 'fast')} keeps fewer blocks"
    return f"{start}; sparse {_may_be_faster(later)}" if (later := _longer(slower)) else start


def _where_all_is_dense(calls: Sequence[AttentionRecord], wording: Wording) -> str:
    faster, forced = faster_calls(calls), setting(calls, wording, "min_length", 0)
    if faster and (gained := _gained_ms(calls)) > 0:
        return (
            f"{forced} makes calls sparse: measured {gained:.3g} ms faster in all, "
            f"in {len(faster)} of {counted(len(calls), 'call')}"
        )
    # What is excluded stays so: others say what keeps them dense.
    others = [call for call in calls if not call.is_excluded]
    if not others and wording.calibrated:
        return ALL_CALIBRATED_DENSE
    reasons = Counter(call.reason for call in others or calls)
    reason = reasons.most_common(1)[0][0] or DenseReason.SLOWER
    few = [call for call in calls if call.reason is DenseReason.FEW_QUERIES]
    if reason is DenseReason.FEW_QUERIES and all(call.q_len == call.kv_len for call in few):
        sizes = {call.config.selector.block_size for call in few if call.config is not None}
        block = f" ({counted(max(sizes), 'token')})" if sizes else ""
        return f"a longer prompt: one that is shorter than a block{block} stays dense"
    of_masks = {call.reason for call in calls if call.lacks_mask_kernel}
    if reason in of_masks:
        return PADDING.format(does="keeps calls dense", way_out="leave it dense")
    if reason is DenseReason.NOT_OPTIMIZED and wording.saved and not wording.registered:
        return wording.use_saved
    if reason not in BY_COST:
        step = NEXT_STEPS.get(reason, "the reasons above say what keeps calls dense")
        return step.format(
            min_length=wording.name_of_min_length, dense_layers=wording.name_of_dense_layers
        )
    parts = []
    if (later := _longer(others)) is not None:
        parts.append(f"a longer prompt: sparse {_may_be_faster(later)}")
    quality = _quality_in_force(calls)
    if quality == "high":
        parts.append("as it is, all attention is dense and the output exact")
    sparser = min((c.sparser for c in calls if c.sparser), key=itemgetter(1), default=None)
    # No other quality is worth naming that would not be sparse from fewer keys on.
    if quality in SPARSER and sparser is not None and (later is None or sparser[1] < later):
        parts.append(
            f"{setting(calls, wording, 'quality', sparser[0])} would be sparse from about "
            f"{sparser[1]} keys on (in whole blocks), at the density expected there"
        )
    slower = f", though {_known(calls)} slower" if reason is DenseReason.SLOWER else ""
    parts.append(f"{forced} makes calls sparse all the same{slower}")
    return "; ".join(parts)


def _gained_ms(calls: Sequence[AttentionRecord]) -> float:
    """Milliseconds that calls would gain that stay dense for their length alone, as measured."""
    times = (call.milliseconds for call in calls if call.measured and call.reason in BY_LENGTH)
    return sum(pair[0] - pair[1] for pair in times if pair is not None)


def _known(calls: Sequence[AttentionRecord]) -> str:
    """How it is known which way is faster."""
    return MEASURED if any(call.measured is not None for call in calls) else PREDICTED


def _quality_in_force(calls: Sequence[AttentionRecord]) -> str | None:
    """The word of the dial that all calls have; ``None`` where they have no such setting."""
    words = {None if call.config is None else quality_of(call.config.selector) for call in calls}
    return words.pop() if len(words) == 1 else None


def _longer(calls: Sequence[AttentionRecord]) -> int | None:
    """Fewest keys from which a call is predicted faster sparse; ``None`` where some are reached."""
    known = [found for call in calls if (found := _later(call)) is not None]
    return min(known) if known and min(known) > max(call.kv_len for call in calls) else None


def _later(call: AttentionRecord) -> int | None:
    """Fewest keys, in whole blocks, from which a call is predicted faster sparse, if it is not."""
    found = None if call.prediction is None else call.prediction.break_even
    if found is None or call.reason not in BY_COST or call.config is None:
        return found
    return max(found, fill_blocks(call.kv_len, call.config.selector.block_size))


def _may_be_faster(later: int) -> str:
    """What is known of longer prompts, which may keep more than is expected."""
    return (
        f"may be faster from about {later} keys on (in whole blocks), at the density expected there"
    )


def _is_predicted_faster(call: AttentionRecord) -> bool:
    """Whether the call is predicted to be faster sparse at the density that it has."""
    p = call.prediction
    return p is not None and p.sparse_ms < p.dense_ms


def _is_expected_faster(call: AttentionRecord) -> bool:
    """Whether the cost model alone, without `min_length`, would have made the call sparse."""
    p = call.prediction
    return p is not None and p.break_even is not None and p.break_even <= call.kv_len
