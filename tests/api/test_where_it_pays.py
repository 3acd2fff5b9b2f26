"""Where the model would rather stay dense `explain` says so, and names no layers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisparse_flex.command_line import CommandLine
from unisparse_flex.passes import DenseReason, SparseConfig
from unisparse_flex.passes.decision.call_forecast import CallForecast
from unisparse_flex.reports import AttentionRecord, Explanation
from unisparse_flex.reports.gains import LEAST_GAIN, NEARLY_ALL_LOSE, does_not_pay
from unisparse_flex.reports.wording import Wording
from unisparse_flex.selectors import selector_of_quality

LAYERS = 30
DENSE_MS = 10.0
SENTENCE = "sparse attention does not pay on this prompt, leave the model dense"
PYTHON, COMMAND = Wording(), Wording(CommandLine("mine"))
BALANCED = SparseConfig.of_model(selector_of_quality("balanced"), min_length=None)


def call(
    index: int, sparse_ms: float, *, measured: bool = False, density: float = 0.92
) -> AttentionRecord:
    """A call of 8192 keys at the default settings; dense it takes 10 ms."""
    prediction = CallForecast(
        dense_ms=DENSE_MS,
        # What was measured has the last word.
        sparse_ms=DENSE_MS if measured else sparse_ms,
        density=density,
        break_even=4096,
        note="",
    )
    return AttentionRecord(
        layer=f"model.layers.{index}.self_attn",
        q_len=8192,
        kv_len=8192,
        decision="sparse",
        density=density,
        prediction=prediction,
        config=BALANCED,
        measured=(DENSE_MS, sparse_ms) if measured else None,
    )


def layers(
    slow: Collection[int],
    gain_ms: float,
    *,
    measured: bool = False,
    excluded: Collection[int] = (),
) -> tuple[AttentionRecord, ...]:
    """A model of which some layers lose 2 ms sparse, and the others gain so many."""
    calls = []
    for i in range(LAYERS):
        sparse_ms = DENSE_MS + 2.0 if i in slow else DENSE_MS - gain_ms
        found = call(i, sparse_ms, measured=measured)
        if i in excluded:
            reason = DenseReason.EXCLUDED
            found = replace(found, decision="dense", density=None, reason=reason)
        calls.append(found)
    return tuple(calls)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("wording", [PYTHON, COMMAND])
@pytest.mark.parametrize(
    ("slow", "gain_ms", "start"),
    [
        (range(30), 0.0, "every sparse call is {known} slower than dense"),
        (range(1, 30), 5.0, "29 of them {known} slower than dense, and the others gain too little"),
        (range(27), 5.0, "27 of them {known} slower than dense, and the others gain too little"),
        (range(15), 0.1, "15 of them {known} slower than dense, and the others gain too little"),
    ],
)
def test_where_the_model_would_rather_stay_dense_it_is_said_in_place_of_layers(
    slow: range, gain_ms: float, start: str, wording: Wording, measured: bool
) -> None:
    found = Explanation(layers(slow, gain_ms, measured=measured), wording=wording)
    known = "measured" if measured else "predicted"
    assert found.verdict.endswith(f"; {start.format(known=known)}: {SENTENCE}")
    for said in (found.verdict, found.next_step):
        assert "dense_layers" not in said
        assert "--dense-layers" not in said
    assert "leave the model dense" in found.next_step
    assert "torch.compile" not in found.next_step
    assert "unisparse-flex speed" not in found.next_step


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize(
    ("slow", "gain_ms"), [((), 5.0), ((), 0.0), ((3,), 5.0), (range(15), 5.0), (range(26), 5.0)]
)
def test_where_the_others_gain_the_layers_are_named(
    slow: Collection[int], gain_ms: float, measured: bool
) -> None:
    for wording in (PYTHON, COMMAND):
        found = Explanation(layers(slow, gain_ms, measured=measured), wording=wording)
        assert SENTENCE not in found.verdict
        named = "--dense-layers" if wording is COMMAND else "dense_layers"
        assert (named in found.verdict) is bool(slow)
        assert ("unisparse-flex speed mine" in found.next_step) is (wording is COMMAND)


@pytest.mark.parametrize("measured", [False, True])
def test_what_is_nothing_of_the_whole_prefill_does_not_pay(measured: bool) -> None:
    # Ten layers gain 1 ms: 3 % of attention.
    calls = layers(range(20), 1.0, measured=measured)
    for rest_ms, pays in ((None, True), (600.0, True), (800.0, False)):
        for wording in (PYTHON, COMMAND):
            found = Explanation(calls, rest_ms, wording)
            assert (SENTENCE not in found.verdict) is pays
            assert ("leave the model dense" in found.next_step) is not pays
            assert ("dense_layers=range(0, 20)" in found.verdict) is (pays and wording is PYTHON)
            assert ("--dense-layers 0-19" in found.next_step) is (pays and wording is COMMAND)


def test_what_else_may_drop_blocks_is_said_in_python_and_in_options() -> None:
    calls = layers(range(30), 0.0)
    step = Explanation(calls).next_step
    assert step.startswith("the slower calls keep more blocks than is expected of the selector (")
    assert step.endswith(
        "): optimize(model, quality='fast') keeps fewer, a longer prompt may keep a smaller share; "
        "or leave the model dense"
    )
    options = Explanation(calls, wording=COMMAND).next_step
    assert options.endswith(
        "): --quality fast keeps fewer, a longer prompt may keep a smaller share; or leave the "
        "model dense"
    )
    calibrated = tuple(
        replace(each, config=replace(BALANCED, selector=selector_of_quality(1.0 + i)))
        for i, each in enumerate(calls, 1)
    )
    anew = Explanation(calibrated, wording=Wording(calibrated=True)).next_step
    assert anew.endswith("): calibrate anew, for a larger kl; or leave the model dense")


@pytest.mark.parametrize("quality", ["fast", "balanced", "high"])
def test_where_a_least_length_makes_calls_sparse_a_sparser_setting_is_named_too(
    quality: str,
) -> None:
    forced = SparseConfig.of_model(selector_of_quality(quality), min_length=0)
    calls = tuple(
        replace(each, config=forced, density=0.8, q_len=1024, kv_len=1024)
        for each in layers(range(30), 0.0)
    )
    start = (
        "calls are sparse because of --min-length: dense is predicted faster at this length; "
        "without it the cost model decides"
    )
    longer = "sparse may be faster from about 4096 keys on (in whole blocks), at the density"
    fewer = "" if quality == "fast" else "--quality fast keeps fewer blocks; "
    said = f"{start}; {fewer}{longer} expected there"
    assert Explanation(calls, wording=COMMAND).next_step == said
    # Nobody typed what the model's configuration says.
    saved = {"quality": quality, "min_length": 0}
    typed = CommandLine("mine", {"--min-length": ("0",)})
    for wording, name in (
        (replace(COMMAND, saved=saved), "min_length in the model's configuration"),
        (Wording(registered="unisparse", saved=saved), "min_length in the model's configuration"),
        (Wording(saved=saved), "min_length"),
        (Wording(typed, saved=saved), "--min-length"),
    ):
        step = Explanation(calls, wording=wording).next_step
        assert step.startswith(f"calls are sparse because of {name}: dense is")


@pytest.mark.parametrize("measured", [False, True])
def test_layers_that_are_dense_already_stay_so_in_advice_and_were_not_looked_at(
    measured: bool,
) -> None:
    calls = layers(range(10, 30), 0.0, measured=measured, excluded=range(10))
    found = Explanation(calls)
    assert found.verdict.endswith(f"slower than dense: {SENTENCE}")
    not_looked_at = "layers 0-9 were not looked at: leave some out of dense_layers to look"
    assert found.next_step.endswith(f"; {not_looked_at}")
    if not measured:
        assert (
            "optimize(model, quality='fast', dense_layers=range(0, 10)) keeps fewer"
            in found.next_step
        )
    options = replace(found, wording=COMMAND).next_step
    assert options.endswith("were not looked at: leave some out of --dense-layers to look")
    # The layers that the verdict would have named are those that are excluded now.
    others = layers(range(10), 5.0, measured=measured, excluded=range(10))
    assert SENTENCE not in Explanation(others).verdict


def test_what_is_measured_faster_at_nearly_all_blocks_is_no_gain() -> None:
    calls = [call(i, 12.0, measured=True, density=0.99) for i in range(15)]
    calls += [call(i, 9.0, measured=True, density=0.9999) for i in range(15, 30)]
    assert Explanation(tuple(calls)).verdict.endswith(SENTENCE)
    # Nothing but the density of those that are faster differs.
    calls[15:] = [replace(each, density=0.5) for each in calls[15:]]
    assert (
        "leave them dense (optimize(model, dense_layers=range(0, 15)))"
        in Explanation(tuple(calls)).verdict
    )


# Quarters, so that sums are exact.
@given(st.lists(st.integers(4, 80), min_size=1, max_size=12), st.booleans())
def test_it_pays_if_and_only_if_the_layers_that_gain_are_worth_it(
    quarters: list[int], measured: bool
) -> None:
    sparse_ms = [each / 4 for each in quarters]
    calls = [call(i, ms, measured=measured, density=0.5) for i, ms in enumerate(sparse_ms)]
    lost = sum(ms > DENSE_MS for ms in sparse_ms)
    dense = DENSE_MS * len(calls)
    gained = sum(max(DENSE_MS - ms, 0.0) for ms in sparse_ms)
    nothing = dense < (1.0 + LEAST_GAIN) * (dense - gained)
    expected = lost > 0 and (lost >= NEARLY_ALL_LOSE * len(calls) or nothing)
    assert does_not_pay(calls) is expected
