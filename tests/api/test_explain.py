"""`explain` says which calls run sparse, which do not, and why; it leaves nothing behind."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.graphs import Stripes
from unisparse_flex import (
    Calibration,
    UniSparse,
    explain,
    optimize,
    restore,
    temporarily_optimize,
)
from unisparse_flex.cli.selectors import describe
from unisparse_flex.command_line import CommandLine
from unisparse_flex.optimization import optimize_layers
from unisparse_flex.passes import DenseReason, SparseConfig, observe_calls
from unisparse_flex.passes.calls import SdpaCall
from unisparse_flex.passes.decision import forecast_call, refuse
from unisparse_flex.passes.decision.call_forecast import CallForecast
from unisparse_flex.passes.decision.cost_forecast import CallShape, forecast
from unisparse_flex.reports import (
    AttentionRecord,
    Explanation,
    record_attention,
    sparse_densities,
)
from unisparse_flex.reports.advice import SPARSER
from unisparse_flex.reports.density import choosing_densities
from unisparse_flex.reports.explain_table import short_names, terminal_columns, three_digits
from unisparse_flex.reports.explanation import MASK_NOTE, _sparser
from unisparse_flex.reports.wording import Wording
from unisparse_flex.selectors import selector_of_quality

from .capture import captured
from .models import SELECTOR, WIDTH, Attention, Transformer, create, embeddings, split_heads
from .reference import ByDefinition, assert_is_sparse, rmse

X = embeddings(300)


def densities() -> list[float]:
    """What the selector keeps in the layers of the model, from the tokens that reach them."""
    mode = ByDefinition(SELECTOR)
    with torch.no_grad(), mode:
        create()(X)
    return [SELECTOR.select(query, key, is_causal=True).density() for query, key, _ in mode.calls]


class Mixed(nn.Module):
    """Calls of every kind that stays dense, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.multihead = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.multihead(x, x, x)[0] + self.multihead(x, x, x, need_weights=False)[0]
        return self.inner(x)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = split_heads(x)
        sdpa = F.scaled_dot_product_attention
        one = sdpa(heads[:, :, -1:], heads, heads)
        dropped = sdpa(heads, heads, heads, dropout_p=0.5)
        flat = sdpa(x, x, x)
        return sdpa(heads, heads, heads, is_causal=True).sum() + one.sum() + dropped.sum() + flat


@pytest.mark.parametrize("compiled", [False, True])
def test_densities_are_those_of_the_selector(compiled: bool) -> None:
    model: Any = optimize(create(), SELECTOR, min_length=0)
    if compiled:
        model = torch.compile(model, backend="eager")
        model(X)
    explanation = explain(model, X)
    assert [call.layer for call in explanation.calls] == [
        "layers.0.attention",
        "layers.1.attention",
    ]
    assert [call.density for call in explanation.sparse] == pytest.approx(densities())
    assert explanation.density == pytest.approx(sum(densities()) / 2)
    assert explanation.dense == ()
    first = explanation.calls[0]
    assert (first.q_len, first.kv_len, first.heads) == (300, 300, "4/2")
    assert (first.decision, first.reason) == ("sparse", None)


def test_dense_calls_have_their_reasons() -> None:
    model = optimize(create(Mixed), SELECTOR, min_length=0)
    calls = explain(model, X).calls
    assert [call.reason for call in calls] == [
        DenseReason.NEEDS_WEIGHTS,
        None,
        DenseReason.FEW_QUERIES,
        DenseReason.DROPOUT,
        DenseReason.NOT_4D,
        None,
    ]
    assert [call.layer for call in calls] == ["multihead"] * 2 + ["inner"] * 4
    assert [call.density is None for call in calls] == [True, False, True, True, True, False]
    kept = [call.density for call in calls if call.density is not None]
    assert explain(model, X).density == pytest.approx(sum(kept) / 2)


def test_a_model_that_was_not_optimized_is_all_dense() -> None:
    explanation = explain(create(), X)
    assert [call.reason for call in explanation.calls] == [DenseReason.NOT_OPTIMIZED] * 2
    assert explanation.density is None
    assert explanation.sparse == ()


def test_short_prompts_and_excluded_layers_are_named() -> None:
    model = optimize(create(), SELECTOR, min_length=301, dense_layers=(1,))
    assert [call.reason for call in explain(model, X).calls] == [
        DenseReason.SHORT,
        DenseReason.EXCLUDED,
    ]


def test_a_model_without_attention_prints_a_hint() -> None:
    explanation = explain(optimize(nn.Linear(WIDTH, WIDTH)), X)
    assert explanation.calls == ()
    assert "no attention call was seen" in str(explanation)
    assert "attn_implementation='sdpa'" in str(explanation)


def test_the_table_holds_every_call_and_the_totals() -> None:
    model = optimize(create(), SELECTOR, min_length=0, dense_layers=(1,))
    explanation = explain(model, X)
    lines = explanation.table().splitlines()
    # The cost model's columns say so.
    assert lines[0].split() == ["predicted", "ms", "sparse"]
    assert lines[0].index("predicted") < lines[1].index("sparse") + len("sparse")
    assert lines[1].split() == [
        *("layer", "keys", "heads", "runs", "density", "dense", "sparse", "from", "why")
    ]
    assert set(lines[2]) == {"-", " "}
    density = f"{densities()[0]:.3f}"
    first, second = (call.prediction for call in explanation.calls)
    assert first is not None
    assert second is not None
    assert lines[3].split() == [
        *("layers.0.attention", "300", "4/2", "sparse", density),
        *(three_digits(first.dense_ms), three_digits(first.sparse_ms)),
        str(first.break_even or "-"),
    ]
    assert lines[4].split()[:4] == ["layers.1.attention", "300", "4/2", "dense"]
    assert lines[4].split()[-1] == "[1]"
    assert lines[5] == f"[1] {DenseReason.EXCLUDED}"
    dense, decided = explanation.predicted_ms
    notes = " ".join(" ".join(lines[6:]).split())
    assert notes.startswith("sparse from: the fewest keys (tokens) from which such a call, of")
    lines = lines[lines.index(next(line for line in lines if line.startswith("predicted, att"))) :]
    assert lines[0] == (
        f"predicted, attention only: {three_digits(decided)} ms as decided, "
        f"{three_digits(dense)} ms all dense"
    )
    assert explanation.rest_ms is not None
    whole, all_dense, rest = (
        three_digits(ms + explanation.rest_ms) for ms in (decided, dense, 0.0)
    )
    assert " ".join(" ".join(lines[1:]).split()) == (
        f"predicted, whole prefill: {whole} ms as decided, {all_dense} ms all dense; the rest of "
        f"the model took {rest} ms here, in one uncompiled run (a first run is slower)"
    )


def test_the_note_says_at_which_density_the_milliseconds_are() -> None:
    def note(**settings: Any) -> str:
        table = explain(optimize(create(), **settings), X).table()
        text = " ".join(table[table.index("sparse from:") :].split())
        return text.replace(" (-: at no length, at that density)", "")

    both = note(selector=SELECTOR, min_length=0)
    said = "milliseconds, those of each call, are at the one found here predicted"
    assert f"expected of the selector; {said}" in both
    one = note(selector=SELECTOR, min_length=0, dense_layers=(1,))
    assert "are at the one found here where a call runs sparse predicted" in one
    none = note(selector=SELECTOR)
    assert "expected of the selector, and so are the milliseconds predicted" in none
    assert "at half of the blocks, which is assumed of a selector without a cost" in note(
        selector=Stripes(), min_length=0
    )


def test_a_dash_is_all_that_says_at_no_length_and_the_note_explains_it() -> None:
    slower, faster = (
        replace(sparse_call(0, 0.1, ms), prediction=predicted(2.0, ms, break_even=None))
        for ms in (3.0, 1.0)
    )
    for calls in ((slower,), (faster,), (slower, faster)):
        table = Explanation(calls).table()
        rows = table.splitlines()[3 : 3 + len(calls)]
        assert [row.split()[-1] for row in rows] == ["-"] * len(calls)
        said = "expected of the selector (-: at no length, at that density); milliseconds"
        assert said in " ".join(table.split())
    known = replace(slower, prediction=predicted(2.0, 3.0, break_even=4096))
    assert "at no length" not in Explanation((known,)).table()


def test_the_verdict_comes_first_and_what_to_do_next_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    explanation = explain(optimize(create(), SELECTOR, min_length=0, dense_layers=(1,)), X)
    text = " ".join(str(explanation).split())
    assert text.startswith(explanation.verdict)
    assert text.endswith(f"next: {explanation.next_step}")
    assert explanation.table() in str(explanation)
    kept = densities()[0]
    start = f"1 of 2 calls sparse, {kept:.0%} of their blocks"
    assert explanation.verdict.startswith(f"{start} ({(kept + 1) / 2:.0%} of all), ")
    # Of a dense call under a mask nobody knows whether it would keep a window.
    sparse, dense = explanation.calls
    assert Explanation((sparse, replace(dense, masked=True))).verdict.startswith(f"{start}, ")
    assert Explanation((sparse,)).verdict.startswith(f"1 of 1 call sparse, {kept:.0%} of blocks, ")


def test_the_total_is_of_what_each_call_does() -> None:
    explanation = explain(optimize(create(), SELECTOR, min_length=0, dense_layers=(1,)), X)
    first, second = (call.prediction for call in explanation.calls)
    assert first is not None
    assert second is not None
    dense, decided = explanation.predicted_ms
    assert dense == pytest.approx(first.dense_ms + second.dense_ms)
    assert decided == pytest.approx(first.sparse_ms + second.dense_ms)
    # Of plain calls nothing is predicted, and nothing is said.
    plain = explain(create(), X)
    assert plain.predicted_ms == (0, 0)
    assert "predicted, attention only" not in str(plain)
    parts = Explanation((*explanation.calls, *plain.calls))
    assert f"predicted for 2 calls, attention only: {decided:.2f} ms as decided" in parts.table()


def test_calls_carry_what_the_cost_model_predicts() -> None:
    explanation = explain(optimize(create(layers=1), SELECTOR), X)
    (call,) = explanation.calls
    assert (call.decision, call.reason) == ("dense", DenseReason.SLOWER)
    assert call.prediction is not None
    assert 0 < call.prediction.dense_ms < call.prediction.sparse_ms < 1000
    assert "doctor --measure" in call.prediction.note
    assert explanation.table().splitlines()[3].split()[-4:] == [
        *(f"{ms:.2f}" for ms in (call.prediction.dense_ms, call.prediction.sparse_ms)),
        str(call.prediction.break_even or "-"),
        "[1]",
    ]


@pytest.mark.parametrize("kept", [1, 2, 10**6])
def test_sparse_calls_are_predicted_at_the_density_that_they_have(kept: int) -> None:
    selector = UniSparse(block_size=32, top_k=kept)
    model = optimize(create(Attention), selector, min_length=0)
    (call,) = explain(model, embeddings(512)).calls
    assert call.prediction is not None
    assert call.prediction.density == call.density
    shape = CallShape(
        *(1, 4, 2, 512, 512, 16, 16), True, False, False, torch.float32, torch.device("cpu")
    )
    found = forecast(shape, selector, call.density)
    assert call.prediction.sparse_ms == found.sparse_seconds * 1e3


def test_the_verdict_says_where_sparse_is_predicted_slower() -> None:
    model = optimize(create(Attention), UniSparse(block_size=32, top_k=10**6), min_length=0)
    explanation = explain(model, embeddings(512))
    (call,) = explanation.sparse
    assert call.prediction is not None
    assert call.prediction.sparse_ms > call.prediction.dense_ms
    assert explanation.verdict == "1 of 1 call sparse, 100% of blocks: nothing is gained"
    assert explanation.next_step.startswith("give the selector a smaller budget")
    some = Explanation((replace(call, density=0.9),))
    assert "every sparse call is predicted slower than dense" in some.verdict
    assert "min_length" in some.next_step
    dense = explain(optimize(create(Attention)), embeddings(200))
    assert not dense.sparse
    assert "slower" not in dense.verdict


def predicted(dense_ms: float, sparse_ms: float, break_even: int | None = 4096) -> CallForecast:
    return CallForecast(
        dense_ms=dense_ms, sparse_ms=sparse_ms, density=0.5, break_even=break_even, note=""
    )


def sparse_call(
    index: int, density: float, sparse_ms: float, kv_len: int = 8192
) -> AttentionRecord:
    return AttentionRecord(
        layer=f"model.layers.{index}.self_attn",
        q_len=kv_len,
        kv_len=kv_len,
        heads="32/8",
        decision="sparse",
        density=density,
        prediction=predicted(10.0, sparse_ms),
    )


@pytest.mark.parametrize(
    ("slow", "advice"),
    [
        ([2], "layer 2 keeps 97%: leave it dense (optimize(model, dense_layers=(2,)))"),
        (
            [0, 1, 2, 3],
            "layers 0-3 keep 97%: leave them dense (optimize(model, dense_layers=(0,1,2,3)))",
        ),
        (
            [0, 1, 2, 3, 4],
            "layers 0-4 keep 97%: leave them dense (optimize(model, dense_layers=range(0, 5)))",
        ),
        (
            [0, 1, 2, 4, 5],
            "layers 0-2, 4-5 keep 97%: leave them dense "
            "(optimize(model, dense_layers=(*range(0,3),4,5)))",
        ),
        (
            [0, 2, 3],
            "layers 0, 2-3 keep 97%: leave them dense (optimize(model, dense_layers=(0,2,3)))",
        ),
    ],
)
def test_the_verdict_names_the_layers_to_leave_dense(slow: list[int], advice: str) -> None:
    calls = [sparse_call(i, 0.97 if i in slow else 0.2, 12 if i in slow else 4) for i in range(8)]
    explanation = Explanation(tuple(calls))
    gain = 80 / (10 * len(slow) + 4 * (8 - len(slow)))
    assert explanation.verdict.endswith(f"x as fast; {advice}, for attention {gain:.3g}x as fast")
    # With the rest of the model, the whole prefill.
    whole = (80 + 20) / (80 / gain + 20)
    verdict = replace(explanation, rest_ms=20.0).verdict
    assert verdict.endswith(f"{advice}, for a whole prefill {whole:.3g}x as fast")
    assert explanation.next_step.startswith("torch.compile(model)")


def test_commands_go_on_with_the_layers_that_the_verdict_leaves_dense() -> None:
    line = CommandLine("mine", {"--dense-layers": ("3",), "--quality": ("high",)})
    slow = [sparse_call(i, 0.9, 12.0) for i in (0, 1)]
    calls = (*slow, sparse_call(2, 0.2, 4.0), excluded(3))
    found = Explanation(calls, wording=Wording(line))
    assert "leave them dense (--dense-layers 0-1,3), for attention" in found.verdict
    assert found.next_step == (
        "unisparse-flex speed mine --quality high --dense-layers 0-1,3 times it compiled, "
        "unisparse-flex quality mine --quality high --dense-layers 0-1,3 says what it changes in "
        "what the model predicts"
    )
    # As typed where nothing is advised.
    assert "--dense-layers 3 times" in replace(found, calls=calls[2:]).next_step


def test_on_the_command_line_advice_names_its_options() -> None:
    slow = [0, 2, 3, 4]
    calls = [sparse_call(i, 0.97 if i in slow else 0.2, 12 if i in slow else 4) for i in range(8)]
    verdict = Explanation(tuple(calls), wording=Wording(CommandLine())).verdict
    assert "leave them dense (--dense-layers 0,2-4), for attention" in verdict


def test_layers_that_are_excluded_already_stay_in_what_is_advised() -> None:
    calls = [sparse_call(i, 0.97 if i == 2 else 0.2, 12 if i == 2 else 4) for i in range(2, 8)]
    excluded = [
        replace(sparse_call(i, 0.2, 4), decision="dense", density=None, reason=DenseReason.EXCLUDED)
        for i in (0, 5)
    ]
    verdict = Explanation((*excluded, *(call for call in calls if "5" not in call.layer))).verdict
    assert (
        "layer 2 keeps 97%: leave it dense (optimize(model, dense_layers=(0,2,5))), for attention"
        in verdict
    )


def test_a_layer_that_is_slower_in_one_of_two_stacks_is_not_named() -> None:
    calls = (
        sparse_call(0, 0.97, 12),
        replace(sparse_call(0, 0.2, 4), layer="decoder.layers.0.attention"),
    )
    verdict = Explanation(calls).verdict
    assert "dense_layers" not in verdict
    assert verdict.endswith("1 of them predicted slower than dense: calibrate, or set top_k")


def test_what_is_next_depends_on_why_nothing_is_gained() -> None:
    dense = AttentionRecord(layer="a", q_len=1024, kv_len=1024, decision="dense")
    slower = replace(dense, reason=DenseReason.SLOWER, prediction=predicted(1, 2))
    never = replace(slower, prediction=predicted(1, 2, None))
    may_be = "sparse may be faster from about 4096 keys on (in whole blocks), at the density"
    assert Explanation((slower, never)).next_step.startswith(
        f"a longer prompt: {may_be} expected there; "
    )
    assert "keys on" not in Explanation((never,)).next_step
    forced = Explanation((sparse_call(0, 0.9, 12, kv_len=1024),)).next_step
    assert forced.startswith("calls are sparse because of min_length: dense is predicted faster")
    assert forced.endswith(
        f"at this length; without it the cost model decides; {may_be} expected there"
    )
    plain = Explanation((replace(dense, reason=DenseReason.NOT_OPTIMIZED),))
    assert "unisparse_flex.optimize(model)" in plain.next_step
    assert plain.verdict == f"the only call stays dense: {DenseReason.NOT_OPTIMIZED}"
    for reason in DenseReason:
        assert Explanation((replace(dense, reason=reason),)).next_step


def excluded(index: int) -> AttentionRecord:
    call = replace(sparse_call(index, 0.2, 4), density=None, decision="dense")
    return replace(call, reason=DenseReason.EXCLUDED)


@pytest.mark.parametrize("line", [None, CommandLine()])
def test_where_most_layers_are_excluded_advice_goes_by_the_others(line: CommandLine | None) -> None:
    wording = Wording(line)
    never = at("high", replace(sparse_call(3, 0.2, 4), decision="dense", density=None))
    never = replace(never, reason=DenseReason.SLOWER, prediction=predicted(1, 2, None))
    others = tuple(at("high", excluded(i)) for i in range(3))
    step = Explanation((*others, never), wording=wording).next_step
    assert step.startswith("as it is, all attention is dense and the output exact; ")
    assert "leave layers out" not in step
    assert "calibration" not in step
    of_layers = "dense_layers" if line is None else "--dense-layers"
    assert Explanation(others, wording=wording).next_step == f"leave layers out of {of_layers}"
    calibrated = replace(wording, calibrated=True)
    assert (
        "every layer is dense by the calibration" in Explanation(others, None, calibrated).next_step
    )


def test_of_layers_beside_sparse_ones_that_keep_all_nothing_is_said_to_be_known() -> None:
    kept = sparse_call(0, 0.999, 9.0)
    calls = (kept, *(excluded(i) for i in (1, 2, 3)))
    bear = "; or state a loss to bear: calibrate(model, batches, kl=0.01)"
    assert Explanation(calls).next_step == (
        "the sparse layer keeps nearly all of its blocks; layers 1-3 were not looked at: leave "
        f"some out of dense_layers to look, or the model dense{bear}"
    )
    one = (at("balanced", kept), at("balanced", sparse_call(1, 0.999, 9.0)), excluded(2))
    assert Explanation(one).next_step == (
        "the sparse layers keep nearly all of their blocks: attention is diffuse there; layer 2 "
        f"was not looked at: leave it out of dense_layers to look, or the model dense{bear}"
    )
    unnamed = replace(excluded(2), layer="attention")
    assert "; 1 layer was not looked at: " in Explanation((kept, unnamed)).next_step
    for wording in (Wording(calibrated=True), Wording(CommandLine(), calibrated=True)):
        assert Explanation((kept, *calls), wording=wording).next_step == (
            "the sparse layer keeps nearly all of its blocks; 3 are dense by the calibration: ask "
            "for a larger kl (or a smaller recall)"
        )


def test_where_attention_is_diffuse_a_loss_to_bear_is_a_way_out() -> None:
    kept, slower = at("fast", sparse_call(0, 0.999, 9.0)), at("fast", sparse_call(0, 0.95, 12.0))
    line = CommandLine("mine", {"--text": ("my.txt",), "--tokens": ("512",), "--quality": ("1",)})
    forced = replace(slower, prediction=predicted(10, 12, None))
    for call in (kept, slower, forced, replace(kept, config=None)):
        found = Explanation((call,))
        said = "or state a loss to bear: calibrate(model, batches, kl=0.01)"
        assert said in found.next_step
        command = "unisparse-flex calibrate mine my.txt --tokens 512 --kl 0.01"
        assert said.replace("calibrate(model, batches, kl=0.01)", command) in (
            replace(found, wording=Wording(line)).next_step
        )
        step = replace(found, wording=Wording(calibrated=True)).next_step
        assert "or calibrate anew, for a larger kl" in step
    step = Explanation((kept,), wording=Wording(CommandLine())).next_step
    assert step.endswith("unisparse-flex calibrate MODEL TEXT --kl 0.01")
    assert "loss" not in Explanation((at("fast", sparse_call(0, 0.5, 12.0)),)).next_step


def test_a_calibration_is_told_by_the_model_that_it_is_in() -> None:
    model = optimize(create(), calibration_at(), min_length=0)
    assert explain(model, X).wording.calibrated
    optimize(model, SELECTOR, min_length=0, dense_layers=(0,))
    assert not explain(model, X).wording.calibrated
    assert not explain(create(), X).wording.calibrated


def calibration_at(*lengths: int) -> Calibration:
    return Calibration(
        layers={"layers.0.attention": SELECTOR, "layers.1.attention": "dense"},
        quality="kl",
        target=0.1,
        reached=0.1,
        density=0.5,
        model="Transformer",
        unisparse_flex="0.1.0",
        torch="2.13.0",
        lengths=lengths,
    )


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ((), "calibrated for kl 0.1, 1 layer sparse"),
        ((200,), "calibrated at 200 tokens for kl 0.1, 1 layer sparse"),
        ((100, 160), "calibrated at 100 to 160 tokens for kl 0.1, 1 layer sparse"),
        (
            (64, 128),
            "calibrated at 64 to 128 tokens for kl 0.1, 1 layer sparse; its target was not looked "
            "at for 300 tokens",
        ),
    ],
)
def test_the_lengths_of_a_calibration_are_said_as_by_the_command(
    lengths: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    calibration = calibration_at(*lengths)
    found = explain(optimize(create(), calibration, min_length=0), X)
    assert found.calibration == calibration
    assert found.notes()[0] == f"selector: {said}"
    assert said in " ".join(str(found).split())
    assert describe(calibration, "a.json", 300) == f"a.json: {said}"
    path = tmp_path / "a.json"
    calibration.save(path)
    of_file: Any = torch.compile(optimize(create(), path, min_length=0), backend="eager")
    assert explain(of_file, X).notes()[0] == f"selector: {said}"


def test_the_note_on_a_calibration_goes_where_its_settings_go() -> None:
    model = optimize(create(), calibration_at(200), min_length=0)

    def is_noted(of: nn.Module) -> bool:
        noted = any(note.startswith("selector: calibrated") for note in explain(of, X).notes())
        assert noted is (explain(of, X).calibration is not None)
        return noted

    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    around = nn.Sequential(model)
    for each in (copied, pickled, around):
        assert is_noted(each)
    with temporarily_optimize(model, SELECTOR, min_length=0):
        assert not is_noted(model)
        with temporarily_optimize(model, calibration_at(150), min_length=0):
            assert "at 150 tokens" in explain(model, X).notes()[0]
        assert not is_noted(model)
    assert "at 200 tokens" in explain(model, X).notes()[0]
    restore(copied)
    assert not is_noted(copied)
    assert "_unisparse" not in " ".join(vars(copied))
    optimize(pickled, SELECTOR, min_length=0)
    optimize(around, SELECTOR, min_length=0)
    for each in (pickled, around, model, create()):
        assert not is_noted(each)


def test_a_model_that_is_compiled_is_not_told_to_be() -> None:
    calls = (sparse_call(0, 0.5, 4.0),)
    said = "torch.compile(model), if it is not compiled"
    model = optimize(create(), SELECTOR, min_length=0)
    plain = replace(explain(model, X), calls=calls)
    assert said in plain.next_step
    compiled: Any = torch.compile(model)
    wrapped = explain(compiled, X).wording
    model.compile()
    for wording in (wrapped, explain(model, X).wording):
        step = Explanation(calls, wording=wording).next_step
        assert step == "compare its time and its output with the dense model's"
        fewer = Explanation((at("high", calls[0]),), wording=wording).next_step
        assert said not in fewer
        assert "quality='balanced'" in fewer


def at(quality: str, call: AttentionRecord) -> AttentionRecord:
    """The call with settings of the dial, decided by the cost model."""
    selector = selector_of_quality(quality)
    return replace(call, config=SparseConfig.of_model(selector, min_length=None))


def grouped(length: int) -> SdpaCall:
    """A causal call of four heads and two of keys, without memory."""
    query, key = (torch.empty(1).expand(1, heads, length, 64) for heads in (4, 2))
    return SdpaCall(query=query, key=key, value=key, is_causal=True, enable_gqa=True)


@pytest.mark.usefixtures("slow_kernels")
@pytest.mark.parametrize("quality", ["high", "balanced"])
def test_a_sparser_setting_is_named_from_a_length_at_which_it_is_sparse(quality: str) -> None:
    config = SparseConfig.of_model(selector_of_quality(quality), min_length=None)
    selector = selector_of_quality(SPARSER[quality])
    sparser, in_part = replace(config, selector=selector), 0
    for length in range(300, 6000, 50):
        call = grouped(length)
        if refuse(call, config) is not DenseReason.SLOWER:
            continue
        found = _sparser(call, config, DenseReason.SLOWER)
        if found is None or found[0] != SPARSER[quality]:
            continue
        first = found[1]
        assert refuse(grouped(max(first, length)), sparser) is None
        known = forecast_call(call, selector)
        in_part += known is not None and (known.break_even or 0) <= length < first
    # Lengths at which the last block is full in part, and costs what is gained.
    assert in_part


def test_a_prompt_that_fills_its_last_block_in_part_is_told_of_whole_ones() -> None:
    dense = replace(
        at("fast", sparse_call(0, 0.5, 12.0, kv_len=4200)),
        decision="dense",
        density=None,
        reason=DenseReason.SLOWER,
    )
    step = Explanation((dense,)).next_step
    assert step.startswith("a longer prompt: sparse may be faster from about 4224 keys on")


@pytest.mark.parametrize("density", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("milliseconds", [4.0, 12.0])
def test_advice_never_names_a_setting_that_is_in_force(density: float, milliseconds: float) -> None:
    call = sparse_call(0, density, milliseconds)
    fast = Explanation((at("fast", call),)).next_step
    assert "quality='balanced'" not in fast
    assert "quality='high'" not in fast
    if milliseconds < call.prediction.dense_ms and density < 1.0:  # type: ignore[union-attr]
        assert "quality" not in fast
    else:
        assert "dense" in fast
        assert ("attention is diffuse here" in fast) is (density >= 0.9)
        assert ("with random weights" in fast) is (density >= 0.9)
    balanced = Explanation((at("balanced", call),)).next_step
    # Where all are kept, and it is slower, no setting of the dial changes much.
    gains = milliseconds < call.prediction.dense_ms  # type: ignore[union-attr]
    named = "optimize(model, quality='fast') keeps fewer" in balanced
    assert named is ((gains or density < 0.99) and density < 1.0)
    assert "more blocks" not in Explanation((at("high", sparse_call(0, 0.4, 4.0)),)).next_step


def test_dense_at_high_is_said_to_be_exact_and_from_where_balanced_is_sparse() -> None:
    model = optimize(create(Attention), quality="high")
    explanation = explain(model, embeddings(200))
    (call,) = explanation.calls
    assert call.reason is DenseReason.SLOWER
    balanced = explain(optimize(model, quality="balanced"), embeddings(200)).calls[0]
    assert balanced.prediction is not None
    assert call.sparser == ("balanced", balanced.prediction.break_even)
    assert "all attention is dense and the output exact" in explanation.next_step
    assert call.prediction is not None
    says = "optimize(model, quality='balanced') would be sparse from about {} keys on (in whole"
    assert says.format(call.sparser[1]) in replace(explanation, calls=(call,)).next_step
    prediction = replace(call.prediction, break_even=8192)
    known = replace(call, sparser=("balanced", 7168), prediction=prediction)
    assert says.format(7168) in Explanation((known,)).next_step
    fast = replace(known, sparser=("fast", 7168))
    assert "optimize(model, quality='fast') would be" in Explanation((fast,)).next_step
    # As long a prompt does without another quality.
    known = replace(known, sparser=("balanced", 8192))
    assert "would be sparse" not in Explanation((known,)).next_step
    assert explanation.next_step.endswith(
        "optimize(model, quality='high', min_length=0) makes calls sparse all the same, though "
        "predicted slower"
    )


@pytest.mark.parametrize(
    ("wording", "call"),
    [
        (Wording(), "optimize(model"),
        (Wording(registered="unisparse"), "register("),
        (Wording(registered="unisparse", saved={"quality": "high"}), "configure(model.config"),
    ],
)
def test_layers_to_leave_dense_keep_the_quality(wording: Wording, call: str) -> None:
    calls = [sparse_call(0, 0.97, 12.0), sparse_call(1, 0.3, 4.0), sparse_call(2, 0.3, 4.0)]
    found = Explanation(tuple(at("high", each) for each in calls), wording=wording)
    start = call if call.endswith("(") else f"{call}, "
    assert f"leave it dense ({start}quality='high', dense_layers=(0,)))" in found.verdict
    balanced = Explanation(tuple(at("balanced", each) for each in calls))
    assert "leave it dense (optimize(model, dense_layers=(0,)))" in balanced.verdict


@pytest.mark.parametrize("reason", [DenseReason.SLOWER, DenseReason.KEEPS_MOST])
def test_dense_by_the_cost_model_is_told_of_longer_prompts_and_what_makes_it_sparse(
    reason: DenseReason,
) -> None:
    call = at("balanced", sparse_call(0, 0.5, 4.0, kv_len=2048))
    dense = replace(call, decision="dense", density=None, reason=reason)
    step = Explanation((dense,)).next_step
    assert step.startswith("a longer prompt: sparse may be faster from about 4096 keys on")
    forced = "optimize(model, min_length=0) makes calls sparse all the same"
    slower = ", though predicted slower" if reason is DenseReason.SLOWER else ""
    assert step.endswith(forced + slower)
    # Both count as calls that could be sparse.
    assert "sparse, 50% of their blocks (75% of all)" in Explanation((call, dense)).verdict


@pytest.mark.parametrize("quality", ["fast", "balanced", "high"])
def test_where_nearly_all_blocks_are_kept_attention_is_said_to_be_diffuse(quality: str) -> None:
    # Faster, as far as anybody knows.
    kept, dropped = (at(quality, sparse_call(0, density, 9.0)) for density in (0.996, 0.9))
    found = Explanation((kept, kept))
    assert found.verdict == "2 of 2 calls sparse, 99.6% of blocks: nothing is gained"
    assert found.next_step == (
        "leave the model dense: attention is diffuse here, as it is in short prompts and with "
        "random weights, so that nearly all blocks are kept; or state a loss to bear: "
        "calibrate(model, batches, kl=0.01)"
    )
    short = Explanation((replace(kept, q_len=512, kv_len=512),)).next_step
    assert short.endswith("; a longer prompt may differ, from 4096 keys on")
    assert "diffuse" not in Explanation((kept, dropped)).next_step
    # What keeps a whole window chose nothing.
    assert "diffuse" not in Explanation((dropped, replace(kept, window=True))).next_step
    assert "diffuse" not in Explanation((replace(kept, window=True),)).next_step


def test_advice_keeps_the_settings_that_are_known() -> None:
    model = create(Attention)
    dense = embeddings(200)
    for settings, said in (
        ({}, "optimize(model, min_length=0) makes"),
        ({"quality": "fast"}, "optimize(model, quality='fast', min_length=0) makes"),
        ({"quality": 2.0}, f"selector={selector_of_quality(2.0).text!r}, min_length=0) makes"),
        ({"backend": "flash"}, "optimize(model, min_length=0, backend='flash') makes"),
    ):
        step = explain(optimize(model, **settings), dense).next_step
        assert said in step
    layers = optimize(create(Transformer), quality="high", dense_layers=(0,))
    excluded, *_, other = explain(layers, embeddings(200)).calls
    assert (excluded.reason, other.reason) == (DenseReason.EXCLUDED, DenseReason.SLOWER)
    said = Explanation((excluded, other, other)).next_step
    whole = "optimize(model, quality='high', min_length=0, dense_layers=(0,))"
    assert f"{whole} makes calls sparse" in said
    eval(whole, {"optimize": optimize, "model": layers})
    first, *_, last = explain(layers, embeddings(200)).calls
    assert (first.reason, last.decision) == (DenseReason.EXCLUDED, "sparse")


def test_advice_says_in_words_what_cannot_be_written_out() -> None:
    model = create(Transformer)
    names = [call.layer for call in explain(model, embeddings(200)).calls]
    of_layers = [UniSparse(), UniSparse(top_p=0.9)]
    optimize_layers(model, dict(zip(names, of_layers, strict=False)))
    unlike = explain(model, embeddings(200))
    assert "min_length=0 added to your settings makes calls sparse" in unlike.next_step
    # Where it is excluded no index says.
    call, nowhere = sparse_call(0, 0.5, 4.0), replace(sparse_call(0, 0.5, 4.0), layer="attention")
    excluded = replace(nowhere, decision="dense", density=None, reason=DenseReason.EXCLUDED)
    found = Explanation((at("high", call), at("high", excluded))).next_step
    assert "; quality='balanced' added to your settings keeps fewer blocks" in found
    for step in (unlike.next_step, found):
        assert "..." not in step


def test_no_sparse_time_is_shown_of_calls_that_are_excluded() -> None:
    call = at("balanced", sparse_call(1, 0.5, 4.0))
    excluded = replace(
        at("balanced", sparse_call(0, 0.5, 3.0)),
        decision="dense",
        density=None,
        reason=DenseReason.EXCLUDED,
    )
    rows = [line.split() for line in Explanation((excluded, call)).table().splitlines()[3:5]]
    assert rows[0][-4:-1] == ["dense", "10.0", "4096"]
    assert rows[1][-3:] == ["10.0", "4.00", "4096"]


class Swallows(nn.Module):
    """Takes names that it has no use for, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = create(Attention)

    def forward(self, x: Tensor, **_: Any) -> Any:
        return self.inner(x)


class Named(Swallows):
    def forward(self, x: Tensor, min_length: int = 5, **_: Any) -> Any:
        return self.inner(x)


@pytest.mark.parametrize(
    ("given", "way_out"),
    [
        ({"min_length": 0}, "optimize(model, min_length=0), then explain it again"),
        ({"quality": "high"}, "optimize(model, quality='high'), then"),
        ({"dense_layers": (0,)}, "optimize(model, dense_layers=(0,)), then"),
    ],
)
def test_settings_are_not_swallowed_by_the_model(given: dict[str, Any], way_out: str) -> None:
    model = optimize(Swallows())
    with pytest.raises(TypeError, match=f"which takes no {next(iter(given))}, got") as raised:
        explain(model, X, **given)
    assert way_out in str(raised.value)
    assert len(explain(model, X, use_cache=False).calls) == 1
    # The model's own argument, of this or of a module inside that it may give it to.
    assert len(explain(optimize(Named()), X, min_length=0).calls) == 1
    outer = Swallows()
    outer.add_module("named", Named())
    assert len(explain(outer, X, min_length=0).calls) == 1


@pytest.mark.parametrize(
    ("sparse_ms", "rest_ms", "said"),
    [
        (10.04, None, "no gain predicted"),
        (9.97, 100.0, "no gain predicted"),
        (15.5, None, "attention predicted 1.55 times as long"),
        (4.0, None, "attention predicted 2.5x as fast"),
        (4.0, 2.0, "attention predicted 2.5x as fast, the whole prefill 2x as fast"),
        (9.0, 1e4, "attention predicted 1.11x as fast, the whole prefill no gain"),
    ],
)
def test_the_verdict_claims_no_gain_that_is_none(
    sparse_ms: float, rest_ms: float | None, said: str
) -> None:
    text = Explanation((sparse_call(0, 0.9, sparse_ms),), rest_ms).verdict
    assert text.split("; ")[0] == f"1 of 1 call sparse, 90% of blocks, {said}"


def test_layers_that_say_the_same_are_one_row() -> None:
    dense = AttentionRecord(layer="", q_len=8, kv_len=8, heads="9/3", decision="dense")
    reasons = [DenseReason.SHORT] * 3 + [DenseReason.EXCLUDED] + [DenseReason.SHORT] * 2
    calls = [
        replace(dense, layer=f"model.layers.{i}.self_attn", reason=reason)
        for i, reason in enumerate(reasons)
    ]
    # No neighbours in one stack.
    calls += [
        replace(calls[-1], layer="model.layers.9.self_attn"),
        replace(calls[-1], layer="h.10.a"),
    ]
    rows = Explanation(tuple(calls)).table().splitlines()[3:]
    names = [row.split()[0] for row in rows if "9/3" in row]
    assert names == [
        *("model.layers.0-2.self_attn", "model.layers.3.self_attn"),
        *("model.layers.4-5.self_attn", "model.layers.9.self_attn", "h.10.a"),
    ]


def test_after_a_long_table_the_verdict_is_said_again() -> None:
    calls = [sparse_call(i, i / 40, 4.0) for i in range(30)]
    for count, times in ((30, 2), (3, 1)):
        explanation = Explanation(tuple(calls[:count]))
        text = " ".join(str(explanation).split())
        assert text.count(explanation.verdict) == times


def test_calls_that_no_sparse_kernel_takes_have_no_prediction() -> None:
    double = optimize(create(layers=1).double(), SELECTOR)
    (call,) = explain(double, X.double()).calls
    assert (call.reason, call.prediction) == (DenseReason.NO_KERNEL, None)
    assert "predicted, attention only" not in str(explain(double, X.double()))
    (plain,) = explain(create(layers=1), X).calls
    assert plain.prediction is None


def test_the_table_says_whose_rates_stand_in() -> None:
    model = optimize(create(layers=1).half(), SELECTOR)
    note = "no rates for float16 on cpu, using bfloat16 on cpu"
    assert note in str(explain(model, X.half())).splitlines()


class GivenQueries(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_cannot_be_judged_is_counted_by_layer(value: float) -> None:
    model = optimize(GivenQueries(), UniSparse(block_size=32, top_k=2), min_length=0)
    q, k = torch.randn(1, 4, 250, 16), torch.randn(1, 2, 250, 16)
    (call,) = explain(model, q, k).calls
    assert call.unjudged == 0
    q[0, 3, 40, 1] = value
    (call,) = explain(model, q, k).calls
    assert call.unjudged == 1
    # In the sixth of eight blocks: two heads share the key, and three query blocks see it.
    k[0, 0, 170, 1] = value
    explanation = explain(model, q, k)
    assert explanation.calls[0].unjudged == 1 + 2 * 3
    assert "7 query blocks keep all: NaN or infinity is held or seen" in str(explanation)
    assert explain(optimize(model, min_length=10**6), q, k).calls[0].unjudged == 0


def test_why_slower_code_runs_on_a_gpu_is_said_once_with_how_many_calls() -> None:
    masked: Any = {"plain_selection": "the mask is a tensor of pairs, no proved formula"}
    calls = [
        AttentionRecord(layer="0", decision="sparse", own_kernel="it is not there"),
        *(AttentionRecord(layer=name, decision="sparse", **masked) for name in "12"),
    ]
    assert Explanation(tuple(calls)).notes() == [
        "PyTorch code selects the blocks of 2 calls, slower than the GPU kernels: the mask is a "
        "tensor of pairs, no proved formula",
        "FlexAttention's own kernel attends in 1 call, slower than FlashAttention-4: it is not "
        "there",
    ]
    model = optimize(create(layers=1), SELECTOR, min_length=0)
    (here,) = explain(model, X).calls
    assert (here.plain_selection, here.own_kernel) == (None, None)


@pytest.mark.parametrize("q_len", [131072, 1])
@pytest.mark.parametrize("columns", [80, 100])
def test_the_table_fits_and_says_each_reason_once(q_len: int, columns: int) -> None:
    prediction = replace(predicted(12345.6, 99.96), break_even=131072)
    shared: Any = {"q_len": q_len, "kv_len": 131072, "heads": "32/8", "prediction": prediction}
    calls = tuple(
        AttentionRecord(
            layer=f"model.layers.{i}.self_attn", decision="dense", reason=reason, **shared
        )
        for i, reason in enumerate([*DenseReason, *DenseReason])
    )
    text = Explanation(calls).table(columns)
    assert max(map(len, text.splitlines())) <= columns
    for number, reason in enumerate(DenseReason, 1):
        assert " ".join(text.split()).count(f"[{number}] {reason} (2 calls)") == 1
    rows = text.splitlines()[3 : 3 + len(calls)]
    # Names may be cut, but tell the layers apart.
    assert all(f".{i}." in row.split()[0] for i, row in enumerate(rows))
    for row, call in zip(rows, calls, strict=True):
        sparse = [] if call.reason is DenseReason.EXCLUDED else ["100.0"]
        assert row.split()[row.split().index("dense") + 1 : -1] == ["12346", *sparse, "131072"]


@pytest.mark.parametrize(
    ("names", "width", "short"),
    [
        (["a.0.b", "a.1.b"], 5, ["a.0.b", "a.1.b"]),
        (
            ["model.layers.0.attn", "model.layers.10.attn"],
            18,
            ["...layers.0.attn", "...layers.10.attn"],
        ),
        (["model.layers.0.attn", "model.layers.10.attn"], 10, ["...0.attn", "...10.attn"]),
        (["model.layers.0.attn", "model.layers.10.attn"], 8, ["...0...", "...10..."]),
        (["vision.0.attention", "text.0.attention"], 12, None),
        (["transformer"], 4, None),
    ],
)
def test_names_lose_what_all_of_them_share(
    names: list[str], width: int, short: list[str] | None
) -> None:
    assert short_names(names, width) == short


def test_the_terminal_decides_the_width_from_80_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tuple(sparse_call(i, 0.2, 4) for i in range(3))
    for columns, longest in (("40", 80), ("80", 80), ("200", 118)):
        monkeypatch.setenv("COLUMNS", columns)
        assert terminal_columns() == longest
        assert max(map(len, str(Explanation(calls)).splitlines())) <= longest


@pytest.mark.parametrize("model", [object(), nn.Linear, "smollm2", None])
def test_what_is_no_module_is_refused_by_name(model: Any) -> None:
    with pytest.raises(
        TypeError, match=r"model must be a torch\.nn\.Module, optimized or not, got "
    ):
        explain(model)


@pytest.mark.parametrize(
    ("args", "kwargs", "name"),
    [
        (("hello",), {}, "input 1 of the model must be .* got a str"),
        (({"input_ids": torch.zeros(1, 4)},), {}, "input 1 of the model must be .* got a dict"),
        (([1, 2, 3],), {}, "input 1 of the model must be .* got a list"),
        ((), {"x": [1, 2, 3]}, "x must be .* got a list"),
    ],
)
def test_inputs_that_are_no_tensors_are_named(args: Any, kwargs: Any, name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name}.*give token ids as a Tensor"):
        explain(Attention(), *args, **kwargs)


def test_a_model_that_takes_texts_is_explained() -> None:
    class OfTexts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, text: str) -> Tensor:
            return self.attention(embeddings(8 * len(text)))

    assert len(explain(OfTexts(), "hello").calls) == 1


def test_an_error_of_the_model_itself_stays() -> None:
    with pytest.raises(TypeError, match="must be Tensor, not int"):
        explain(Attention(), 3)


class Windowed(nn.Module):
    """A sliding window as a mask that the model computes, or causality by flag.

    With ``holes`` the window is one that no formula spells out.
    """

    def __init__(self, *, masked: bool, holes: bool = False) -> None:
        super().__init__()
        self.masked, self.holes = masked, holes

    def forward(self, x: Tensor) -> Tensor:
        heads, position = split_heads(x), torch.arange(x.shape[1])
        behind = position[:, None] - position[None, :]
        mask = (behind >= 0) & (behind < 64) if self.masked else None
        if mask is not None and self.holes:
            mask = mask & (behind * position % 7 != 3)
        return F.scaled_dot_product_attention(
            heads, heads, heads, attn_mask=mask, is_causal=not self.masked
        )


@pytest.mark.parametrize("min_length", [0, None])
def test_the_table_says_that_a_compiled_model_may_prove_its_masks(min_length: int | None) -> None:
    masked = optimize(Windowed(masked=True, holes=True), SELECTOR, min_length=min_length)
    (call,) = explain(masked, X).calls
    assert call.reason is (None if min_length == 0 else DenseReason.NO_KERNEL)
    assert call.masked
    step = explain(masked, X).next_step
    assert step.startswith("padding, or another mask that is a tensor")
    assert step.endswith("leave it dense" if min_length is None else "leave out min_length")
    assert explain(masked, X).notes()[-1] == MASK_NOTE
    assert MASK_NOTE in " ".join(str(explain(masked, X)).split())
    by_flag = optimize(Windowed(masked=False), SELECTOR, min_length=min_length)
    assert MASK_NOTE not in str(explain(by_flag, X))


class Padded(nn.Module):
    """Attention that hides padding; of two rows the first has some, on the right."""

    def forward(self, x: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        heads = split_heads(x).to(dtype)
        lengths = torch.tensor([x.shape[1] - 40, x.shape[1]])
        valid = torch.arange(x.shape[1]) < lengths[:, None]
        mask = valid[:, None, None, :] & torch.ones(x.shape[1], x.shape[1]).tril().bool()
        return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)


@pytest.mark.parametrize("min_length", [None, 0, 8192])
def test_padding_on_a_cpu_is_named_and_nothing_that_does_not_help(min_length: int | None) -> None:
    model = optimize(Padded(), SELECTOR, min_length=min_length)
    found = explain(model, torch.cat([X, X]))
    sparse = min_length == 0
    assert len(found.sparse) == sparse
    assert found.next_step == (
        "padding, or another mask that is a tensor, "
        + ("makes sparse calls slower than dense ones" if sparse else "keeps calls dense")
        + ": no sparse CPU kernel reads it; run prompts of one length, or "
        + ("leave out min_length" if sparse else "leave it dense")
    )
    # Compiled, it is proved to be padding, and no kernel reads that either.
    assert found.notes() == []
    # Nor does it help to leave other layers out of those that stay dense.
    excluded = AttentionRecord(layer="0", decision="dense", reason=DenseReason.EXCLUDED)
    assert Explanation((excluded, excluded, *found.calls)).next_step == found.next_step
    command = replace(found, wording=Wording(CommandLine())).next_step
    assert command == found.next_step.replace("min_length", "--min-length")


def test_only_what_no_kernel_takes_without_a_mask_either_sends_to_doctor() -> None:
    model = optimize(Padded(), SELECTOR)
    found = explain(model, torch.cat([X, X]), dtype=torch.float64)
    assert found.calls[0].reason is DenseReason.NO_KERNEL
    assert found.next_step.startswith("run unisparse-flex doctor")


def test_the_table_is_silent_about_masks_that_are_read() -> None:
    found = explain(optimize(Windowed(masked=True), SELECTOR, min_length=0), X)
    assert not found.calls[0].masked
    assert MASK_NOTE not in str(found)


def test_the_table_is_silent_about_masks_of_calls_that_stay_dense_anyway() -> None:
    model = optimize(Windowed(masked=True), SELECTOR, min_length=301)
    assert MASK_NOTE not in str(explain(model, X))


@pytest.mark.parametrize("min_length", [None, 301])
def test_a_window_that_stays_dense_is_not_taken_for_padding(min_length: int | None) -> None:
    found = explain(optimize(Windowed(masked=True), SELECTOR, min_length=min_length), X)
    (call,) = found.calls
    assert call.reason in (None, DenseReason.SLOWER, DenseReason.SHORT)
    assert call.prediction is not None
    assert "padding" not in found.next_step


def test_a_window_is_kept_whole_where_it_is_explained_and_where_it_is_compiled() -> None:
    model = optimize(Windowed(masked=True), SELECTOR, min_length=0)
    compiled: Any = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        dense, output = Windowed(masked=True)(X), compiled(X)
    (call,) = explain(model, X).calls
    assert (call.density, call.window) == (1.0, True)
    assert rmse(output, dense) < 1e-6
    # Uncompiled on a CPU the tensor is not read.
    assert rmse(model(X), dense) > 1e-2


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool) -> None:
    model = optimize(create(), SELECTOR, min_length=0)
    if fails:
        with pytest.raises(RuntimeError):
            explain(model, X[..., :-1])
    else:
        explain(model, X)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert captured(model, X).marked() == [2]
    with torch.no_grad():
        assert_is_sparse(model(X), create(), SELECTOR, X)


def test_modes_and_training_flags_stay() -> None:
    model = optimize(create().train(), SELECTOR, min_length=0)
    explain(model, X)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_recording_sees_every_forward_inside() -> None:
    model = optimize(create(Transformer), SELECTOR, min_length=128)
    with torch.no_grad(), record_attention(model) as calls:
        model(X)
        model(embeddings(100))
    assert [call.decision for call in calls] == ["sparse"] * 2 + ["dense"] * 2
    with torch.no_grad():
        model(X)
    assert len(calls) == 4


def test_arguments_reach_the_model() -> None:
    model = optimize(create(), SELECTOR, min_length=0)
    assert explain(model, x=X).calls == explain(model, X).calls


def test_observers_outside_see_the_calls_that_those_inside_see() -> None:
    seen: list[str] = []
    model = optimize(create(), SELECTOR, min_length=0)
    with (
        observe_calls(lambda *_: seen.append("outer")),
        observe_calls(lambda *_: seen.append("inner")),
    ):
        model(X)
    assert seen == ["outer", "inner"] * 2
    with observe_calls(lambda *_: seen.append("alone")):
        model(X)
    assert seen[4:] == ["alone"] * 2


def test_notes_stand_between_the_table_and_what_is_next() -> None:
    model = optimize(GivenQueries().half(), UniSparse(block_size=32, top_k=2), min_length=0)
    q, k = torch.randn(1, 4, 250, 16).half(), torch.randn(1, 2, 250, 16).half()
    explanation = explain(model, q, k)
    (note,) = explanation.notes()
    text = str(explanation)
    assert text.index(explanation.table()) < text.index(note) < text.index("next: ")
    assert Explanation(()).notes() == []
    assert str(Explanation(())).split() == (
        f"{Explanation(()).verdict} next: {Explanation(()).next_step}".split()
    )


class Local(nn.Module):
    """A layer within a window, and one that sees everything, masks as Hugging Face's models do."""

    def forward(self, q: Tensor) -> Tensor:
        position = torch.arange(q.shape[2], device=q.device)
        near = (position <= position[:, None]) & (position > position[:, None] - 64)
        q = F.scaled_dot_product_attention(q, q, q, attn_mask=near[None, None])
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def test_a_window_kept_whole_is_no_choice_and_not_in_the_density() -> None:
    torch.manual_seed(0)
    model = optimize(Local(), UniSparse(block_size=32, top_k=2), min_length=0)
    query = torch.randn(1, 2, 512, 16)
    found = explain(model, query)
    window, other = found.calls
    assert (window.window, other.window) == (True, False)
    assert window.density == 1.0
    assert not window.masked
    assert other.density is not None
    assert f"2 of 2 calls sparse (1 keeps a whole window), {other.density:.0%} of blocks" in str(
        found.verdict
    )
    assert choosing_densities(sparse_densities(found.calls)) == [other.density]
    assert found.density == other.density
    assert choosing_densities(sparse_densities([window])) == [1.0]


def timed(layer: int, dense_ms: float, sparse_ms: float | None, **other: Any) -> AttentionRecord:
    return replace(sparse_call(layer, 0.5, 4.0), measured=(dense_ms, sparse_ms), **other)


DENSE: dict[str, Any] = {"decision": "dense", "reason": DenseReason.SLOWER, "density": None}


def test_where_calls_were_timed_the_verdict_goes_by_that() -> None:
    # Predicted slower than dense, measured twice as fast.
    slow = sparse_call(0, 0.9, 12.0)
    assert "predicted" in Explanation((slow,)).verdict
    fast = Explanation((replace(slow, measured=(10.0, 5.0)),), wording=Wording(CommandLine()))
    assert fast.verdict.endswith("attention measured 2x as fast")
    assert "slower" not in fast.verdict
    assert fast.next_step.startswith("unisparse-flex speed MODEL")
    # With the rest of the model, which takes as long as dense attention.
    assert "the whole prefill 1.33x as fast" in replace(fast, rest_ms=10.0).verdict


def test_layers_that_were_measured_slower_are_named() -> None:
    calls = (timed(0, 10.0, 11.0), timed(1, 10.0, 5.0))
    verdict = Explanation(calls).verdict
    assert verdict.endswith(
        "layer 0 keeps 50%: leave it dense (optimize(model, dense_layers=(0,))), for attention "
        "1.33x as fast"
    )
    every = Explanation((timed(0, 10.0, 11.0), timed(1, 10.0, 20.0)))
    assert every.verdict.endswith(
        "; every sparse call is measured slower than dense: sparse attention does not pay on this "
        "prompt, leave the model dense"
    )
    assert "the cost model is wrong here" in every.next_step


def test_dense_calls_that_were_measured_faster_sparse_are_counted() -> None:
    calls = (timed(0, 10.0, 4.0, **DENSE), timed(1, 10.0, 11.0, **DENSE))
    found = Explanation(calls, wording=Wording(CommandLine()))
    assert found.verdict.endswith("; 1 of the dense calls was measured faster sparse")
    assert found.next_step == (
        "--min-length 0 makes calls sparse: measured 5 ms faster in all, in 1 of 2 calls"
    )
    slower = Explanation((timed(0, 10.0, 9.0, **DENSE), timed(1, 10.0, 12.0, **DENSE)))
    assert slower.next_step.endswith("though measured slower")
    # What is left out on purpose, or cannot be sparse, is nobody's mistake.
    excluded = timed(0, 10.0, 4.0, **(DENSE | {"reason": DenseReason.EXCLUDED}))
    unable = timed(0, 10.0, None, **DENSE)
    for call in (excluded, unable):
        assert "measured faster" not in Explanation((call,)).verdict


def test_every_reason_for_dense_calls_is_given() -> None:
    few = replace(timed(0, 1.0, 1.0, **DENSE), reason=DenseReason.FEW_QUERIES, measured=None)
    slower = replace(few, reason=DenseReason.SLOWER)
    assert Explanation((few, slower, slower, slower)).verdict == (
        f"all 4 calls stay dense; 3 of them: {DenseReason.SLOWER}; 1: {DenseReason.FEW_QUERIES}"
    )
