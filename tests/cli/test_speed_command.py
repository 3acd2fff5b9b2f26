"""`unisparse-flex speed`: ways side by side, packages of other work named, wrong arguments."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.cli.test_page import FETCHING_TAGS, Page
from unisparse_flex import clock, evaluation
from unisparse_flex.cli import models
from unisparse_flex.cli import speed as command
from unisparse_flex.command_line import CommandLine
from unisparse_flex.evaluation import RIVALS, LoadedRival
from unisparse_flex.evaluation import speed as measured
from unisparse_flex.reports import render_speed

LINE = CommandLine()
KEYS = {
    *("schema", "kind", "model", "model_class", "weights", "densities", "device", "versions"),
    *("command", "settings", "selectors", "rows", "against", "verdict", "notes"),
}
ROW_KEYS = {
    *("tokens", "run", "setting", "name", "ms", "times_ms", "first_call_seconds", "density"),
    *("sparse_calls", "windows", "calls", "kl_last_token", "same_token", "error", "speedup"),
    *("output_error", "worst_output_error", "told_apart", "sparse_density"),
}


@pytest.fixture
def uncompiled(monkeypatch):
    """Modules whose compilation was asked for; they stay as they are."""
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: asked.append(self))
    return asked


def timed(run, folder, *options):
    ran = run("speed", folder, "--lengths", "256", "--repeats", "2", "-q", *options, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_ways_stand_side_by_side_with_density_and_divergence(run, model_folder, uncompiled):
    found = timed(run, model_folder, "--min-length", "0", "--quality", "fast,1e6")
    assert set(found) == KEYS
    assert [set(row) for row in found["rows"]] == [ROW_KEYS] * 4
    assert (found["kind"], found["weights"], found["densities"]) == ("speed", "as loaded", "free")
    eager, compiled, fast, kept = found["rows"]
    assert [row["name"] for row in found["rows"]] == [
        *("dense eager", "dense compiled", "sparse, fast", "sparse, 1e6"),
    ]
    assert all(len(row["times_ms"]) == 2 and row["error"] is None for row in found["rows"])
    assert all(row["first_call_seconds"] > 0 for row in found["rows"])
    assert (eager["density"], compiled["calls"]) == (None, 0)
    assert 0 < fast["density"] <= kept["density"] == 1.0
    assert kept["kl_last_token"] == pytest.approx(0.0, abs=1e-6)
    assert kept["same_token"]
    best = min(eager["ms"], compiled["ms"])
    assert fast["speedup"] == pytest.approx(best / fast["ms"])
    # Two layers of three ways.
    assert len(uncompiled) == 6


@pytest.fixture
def interrupt(monkeypatch):
    """Interrupts the call of the clock of that number, from 1 on."""

    def at(number):
        calls = []

        def timed(function, device):
            calls.append(function)
            if len(calls) == number:
                raise KeyboardInterrupt
            return function(), 0.001 * len(calls)

        monkeypatch.setattr(measured, "timed", timed)

    return at


# The first calls of three ways, the turn that warms up, and turns of three.
@pytest.mark.parametrize(("number", "repeats"), [(8, [1, 0, 0]), (13, [2, 2, 2]), (15, [3, 3, 2])])
def test_what_was_timed_is_printed_where_it_is_interrupted(
    run, model_folder, uncompiled, interrupt, tmp_path, number, repeats
):
    interrupt(number)
    output = tmp_path / "speed.json"
    ran = run(
        *("speed", model_folder, "--lengths", "256,512", "--repeats", "3", "-q"),
        *("--min-length", "0", "--output", output),
    )
    assert ran.code == 130
    assert ran.err.splitlines()[-1] == "interrupted"
    assert "Interrupted: times are of the repeats that were finished" in ran.out
    rows = json.loads(output.read_text())["rows"]
    assert [row["tokens"] for row in rows] == [256] * 3
    assert [len(row["times_ms"]) for row in rows] == repeats
    assert [row["error"] for row in rows] == [None if n else "interrupted" for n in repeats]


def test_rows_of_shorter_prompts_stay_where_a_longer_one_is_interrupted(
    run, model_folder, uncompiled, interrupt
):
    interrupt(11)
    ran = run(
        *("speed", model_folder, "--lengths", "256,512", "--repeats", "1", "-q", "--json"),
        *("--min-length", "0"),
    )
    assert ran.code == 130
    rows = json.loads(ran.out)["rows"]
    assert [(row["tokens"], row["error"]) for row in rows] == [
        *[(256, None)] * 3,
        *[(512, "interrupted")] * 2,
    ]


def test_nothing_is_printed_where_nothing_was_timed(run, model_folder, uncompiled, interrupt):
    interrupt(2)
    ran = run("speed", model_folder, "--lengths", "256", "--repeats", "1", "-q")
    assert (ran.code, ran.out) == (130, "")


def test_the_whole_model_is_compiled_where_that_is_asked_for(run, model_folder, uncompiled):
    found = timed(run, model_folder, "--compile", "model", "--tokens", "300")
    assert [type(module).__name__ for module in uncompiled] == ["LlamaForCausalLM"] * 2
    assert found["settings"]["compile"] == "model"
    # Another name of --lengths.
    assert found["settings"]["lengths"] == [300]


def test_calls_that_stay_dense_are_said_to(run, model_folder, uncompiled, caplog):
    found = timed(run, model_folder)
    assert found["rows"][2]["sparse_calls"] == 0
    assert found["rows"][2]["density"] is None
    assert found["verdict"][0] == (
        "At 256 tokens balanced leaves every attention call dense; unisparse-flex explain "
        f"{model_folder} --tokens 256 says why."
    )
    # Advice for who works in Python.
    assert not [record for record in caplog.records if "unisparse_flex.explain" in record.msg]


def test_what_one_way_cannot_do_stays_in_its_row(run, model_folder, monkeypatch):
    def refuse(self, **_):
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(torch.nn.Module, "compile", refuse)
    found = timed(run, model_folder, "--min-length", "0")
    eager, compiled, sparse = found["rows"]
    assert eager["ms"] > 0
    for row in (compiled, sparse):
        assert (row["ms"], row["error"]) == (None, "RuntimeError: no compiler was found")
    assert "could not be timed: RuntimeError" in found["verdict"][0]
    assert "no compiler was found" in render_speed(found)


def headings(found):
    html = render_speed(found)
    return re.findall(r'scope="col">([^<]*)<', html), re.findall(r"<t[dh][ >]", html)


def test_a_page_has_no_empty_columns(run, model_folder, uncompiled):
    found = timed(run, model_folder, "--min-length", "0")
    names, cells = headings(found)
    assert names == [
        *("run", "first token, ms", "over dense", "density", "KL, last token", "sparse calls"),
        "first call, s",
    ]
    assert len(cells) == 7 * 4
    # One row that has it is enough.
    found["rows"][2] |= {"output_error": 0.042, "error": "of a kind"}
    names, cells = headings(found)
    assert names[-4:] == ["off dense", "sparse calls", "first call, s", "error"]
    assert len(cells) == 9 * 4


def test_a_run_without_a_sparse_call_has_the_colour_of_dense_ones(run, model_folder, uncompiled):
    def kinds(found):
        return re.findall(r'<i class="(\w+)"', render_speed(found))

    assert kinds(timed(run, model_folder, "--min-length", "0")) == ["dense", "dense", "sparse"]
    assert kinds(timed(run, model_folder)) == ["dense"] * 3


def test_text_and_page_hold_what_json_does(run, model_folder, uncompiled, tmp_path):
    html, output = tmp_path / "speed.html", tmp_path / "speed.json"
    ran = run(
        *("speed", model_folder, "--lengths", "512,256", "--repeats", "1", "--min-length", "0"),
        *("--against", "xattn,minference", "--html", html, "--output", output),
    )
    assert ran.code == 0, ran.err
    # A command that is named stays whole.
    lines = [line for line in ran.out.splitlines() if not line.startswith("  unisparse-flex ")]
    assert max(map(len, lines)) <= 80
    assert f"wrote {html}" in ran.err
    found = json.loads(output.read_text())
    page = Page(html.read_text(encoding="utf-8"))
    assert page.open == []
    assert not FETCHING_TAGS & set(page.tags)
    text = " ".join(page.text)
    for row in found["rows"]:
        assert f"{row['ms']:.1f}" in ran.out
        assert f"{row['first_call_seconds']:.1f}" in text
    assert found["settings"]["lengths"] == [256, 512]
    assert "xattn" in text


def test_a_verdict_says_slower_and_that_times_scatter():
    row = {
        "tokens": 9,
        "setting": "balanced",
        "error": None,
        "sparse_calls": 2,
        "windows": 0,
        "density": 0.25,
        "kl_last_token": 0.0123,
        "ms": 10.0,
        "times_ms": [10.0, 10.0],
        "told_apart": True,
        "output_error": None,
        "worst_output_error": None,
    }
    assert command.say_verdict([row | {"speedup": 1.5}], LINE) == [
        "At 9 tokens balanced brings the first token 1.50 times as fast as the fastest dense run, "
        "with 25% of the blocks."
    ]
    slower, scattered = command.say_verdict(
        [row | {"speedup": 0.5, "times_ms": [10.0, 31.0]}], LINE
    )
    assert slower == (
        "At 9 tokens balanced is slower: its first token takes 2.00 times as long as that of the "
        "fastest dense run, with 25% of the blocks; unisparse-flex explain MODEL says why."
    )
    slow = row | {"speedup": 0.5}
    assert command.say_verdict([slow], LINE, foreign=True) == [slower, command.FOREIGN_RATES]
    assert "doctor --measure" in command.FOREIGN_RATES
    # Nothing is wrong with a prediction of a gain.
    assert len(command.say_verdict([row | {"speedup": 1.5}], LINE, foreign=True)) == 1
    line = CommandLine("mine", {"--quality": ("fast,high",), "--tokens": ("4096",)})
    (options,) = command.say_verdict([row | {"speedup": 0.5, "setting": "high"}], line)
    assert options.endswith("; unisparse-flex explain mine --tokens 9 --quality high says why.")
    assert scattered.startswith("Times of one way differ by up to 3.1 times")
    other = row | {"speedup": 1.5, "output_error": 0.042, "worst_output_error": 0.31}
    assert command.say_verdict([other | {"setting": "xattn"}], LINE) == [
        "At 9 tokens xattn brings the first token 1.50 times as fast as the fastest dense run, its "
        "attention 4.2% off dense attention, at worst 31.0%."
    ]


@pytest.mark.parametrize(
    ("density", "sparse", "dense", "told_apart"),
    [
        (0.4, [8.0, 8.2, 8.1], [9.0, 9.3, 9.1], True),
        (0.4, [8.0, 9.2, 8.1], [9.0, 9.3, 9.1], False),
        (0.4, [10.0, 10.2, 10.1], [9.0, 9.3, 9.1], True),
        (0.4, [8.0], [9.0], False),
        (0.996, [8.0, 8.2, 8.1], [9.0, 9.3, 9.1], False),
        (1.0, [10.0, 10.2, 10.1], [9.0, 9.3, 9.1], True),
        (None, [8.0, 8.2, 8.1], [9.0, 9.3, 9.1], True),
    ],
)
def test_no_gain_is_claimed_that_may_be_noise(density, sparse, dense, told_apart):
    def row(setting, times, density):
        return {
            **{
                "tokens": 9,
                "setting": setting,
                "times_ms": times,
                "ms": sorted(times)[len(times) // 2],
            },
            **{"density": density, "sparse_calls": 2, "error": None, "kl_last_token": 0.01},
            **{"windows": 0, "output_error": None, "worst_output_error": None},
        }

    rows = [row(None, dense, None), row("fast", sparse, density)]
    command.add_speedups(rows)
    assert [each["told_apart"] for each in rows] == [None, told_apart]
    if density is not None:
        verdict, *more = command.say_verdict(rows, LINE, longer=lambda: 18)
        noise = "no difference to the fastest dense run that can be told" in verdict
        assert noise is not told_apart
        # What keeps all blocks does not gain by more repeats.
        all_kept = not told_apart and density >= 0.995
        assert verdict.endswith("explain MODEL says why.") is (all_kept or sparse[0] > dense[0])
        assert bool(more) is (noise and not all_kept)


FASTER, DENSE = [8.0, 8.2, 8.1], [9.0, 9.3, 9.1]


@pytest.mark.parametrize(
    ("calls", "windows", "density", "masked", "told_apart", "said"),
    [
        # Windows drop nothing; what they gain is what a mask tensor costs.
        (18, 15, 0.34, False, True, "Of 18 sparse calls 15 keep a whole sliding window"),
        (15, 15, 1.0, False, True, "Of 15 sparse calls 15 keep a whole sliding window"),
        # So do calls that stay dense where a compiled model builds one.
        (0, 0, None, True, True, "It brings the first token 1.12 times as fast as"),
        (0, 0, None, False, False, None),
        (2, 0, 1.0, False, False, None),
        (2, 0, 1.0, True, True, None),
    ],
)
def test_a_gain_without_dropped_blocks_has_its_cause(
    calls, windows, density, masked, told_apart, said
):
    base = {"tokens": 9, "error": None, "output_error": None, "windows": 0, "density": None}
    dense = base | {"setting": None, "times_ms": DENSE, "ms": 9.1, "sparse_calls": 0}
    row = base | {"setting": "balanced", "times_ms": FASTER, "ms": 8.1, "density": density}
    rows = [dense, row | {"sparse_calls": calls, "windows": windows}]
    command.add_speedups(rows, masked=masked)
    assert rows[1]["told_apart"] is told_apart
    verdict = command.say_verdict(rows, LINE)
    assert any(each.startswith(said) for each in verdict[1:]) if said else len(verdict) == 1
    if calls and told_apart:
        assert "1.12 times as fast" in verdict[0]


def noisy(setting, times, tokens=4096):
    return {
        **{"tokens": tokens, "setting": setting, "error": None, "sparse_calls": 2},
        **{"density": 0.5, "ms": times[0], "times_ms": times, "speedup": 1.01, "windows": 0},
        **{"told_apart": False, "output_error": None, "worst_output_error": None},
    }


def test_what_cannot_be_told_from_noise_names_the_commands_that_may_tell():
    typed = {"--text": ("my.txt",), "--tokens": ("1024,4096",), "--quality": ("fast,high",)}
    line = CommandLine("mine", typed | {"--compile": ("model",), "--repeats": ("3",)})
    rows = [noisy("fast", [10.0, 10.1, 10.2]), noisy("high", [10.0, 10.1, 10.2])]
    fast, high, more = command.say_verdict(rows, line, longer=lambda: 8192)
    for said, setting in ((fast, "fast"), (high, "high")):
        assert said == (
            f"At 4096 tokens {setting} shows no difference to the fastest dense run that can be "
            "told from noise, with 50% of the blocks."
        )
    assert more == (
        "unisparse-flex speed mine --text my.txt --tokens 4096 --quality fast,high --compile model "
        "--repeats 10 repeats more often, which tells smaller differences from noise; "
        "unisparse-flex speed mine --text my.txt --tokens 8192 --quality fast,high --compile model "
        "--repeats 3 reads a longer prompt, of which sparse attention gains more."
    )
    *_, more = command.say_verdict([noisy("fast", [10.0] * 20)], LINE)
    assert more == (
        "unisparse-flex speed MODEL --repeats 40 repeats more often, which tells smaller "
        "differences from noise."
    )


def test_commands_against_noise_can_be_run_and_stay_whole(
    run, model_folder, uncompiled, monkeypatch, tmp_path
):
    monkeypatch.setattr(command, "_is_told_apart", lambda *_: False)
    monkeypatch.setattr(command, "NEARLY_ALL", 2.0)
    text = tmp_path / "a.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 8)
    options = ("--quality", "fast", "--min-length", "0", "--repeats", "1", "-q")
    for given, longer in (((), "512"), (("--text", text), "360")):
        ran = run("speed", model_folder, *given, "--tokens", "256", *options)
        assert ran.code == 0, ran.err
        # One line each.
        commands = re.findall(r"^ *unisparse-flex (speed .* --repeats \d+)$", ran.out, re.M)
        lengths = [shlex.split(each)[shlex.split(each).index("--tokens") + 1] for each in commands]
        assert lengths == ["256", longer]
        for each in commands:
            assert run(*shlex.split(each), "-q").code == 0
    # Nothing is longer than the model's context, or the text.
    for given, tokens in (((), "512"), (("--text", text), "360")):
        ran = run("speed", model_folder, *given, "--tokens", tokens, *options)
        assert "repeats more often" in ran.out
        assert "longer prompt" not in ran.out


@pytest.mark.parametrize("busy", [False, True])
def test_times_of_a_busy_machine_are_said_to_be(
    run, model_folder, uncompiled, monkeypatch, tmp_path, busy
):
    monkeypatch.setattr(clock, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(clock, "LEAST_SHARE", 1000.0 if busy else 0.0)
    html, output = tmp_path / "speed.html", tmp_path / "speed.json"
    options = ("--lengths", "256", "--repeats", "2", "-q", "--html", html, "-o", output)
    ran = run("speed", model_folder, *options)
    said = "Other work took part of this machine while it was timed: the model had a core "
    notes = json.loads(output.read_text())["notes"]
    assert [note.startswith(said) for note in notes].count(True) == int(busy)
    for text in (ran.out, html.read_text()):
        assert (said[:40] in " ".join(text.split())) is busy


def test_the_name_of_a_calibration_s_file_is_not_cut(
    run, model_folder, uncompiled, save_calibration
):
    path = save_calibration(1, (100,))
    options = ("--lengths", "256", "--repeats", "1", "--min-length", "0", "-q")
    ran = run("speed", model_folder, "--selector", path, *options)
    assert ran.code == 0, ran.err
    (row,) = (line for line in ran.out.splitlines() if "  sparse, calibration.json  " in line)
    assert len(row) <= 80
    assert "calibrated at 100 tokens for kl 0.01, 1 layer sparse; its target was not" in " ".join(
        ran.out.split()
    )


def test_packages_of_other_work_are_named_where_they_are_missing():
    found, loaded = command.find_rivals(command.RIVALS)
    assert [each["name"] for each in found] == list(command.RIVALS) == list(RIVALS)
    assert loaded == []
    for each in found:
        assert (each["importable"], each["version"], each["settings"]) == (False, None, None)
        assert each["status"].startswith(f"not run: {each['name']} must have one of ")


def run_against(run, folder, monkeypatch, call, *options):
    """Speed against a package whose attention is ``call``."""
    rival = LoadedRival(name="xattn", version="1.2", settings={"stride": 16}, call=call)
    monkeypatch.setattr(evaluation, "load_rival", lambda name: rival)
    return timed(run, folder, "--against", "xattn", "--min-length", "0", *options)


def attend(query, key, value, scale):
    return scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=True
    )


def test_other_work_runs_in_compiled_layers_and_is_judged(
    run, model_folder, uncompiled, monkeypatch
):
    found = run_against(run, model_folder, monkeypatch, attend, "--compile", "model")
    row = found["rows"][-1]
    assert (row["name"], row["run"], row["setting"]) == ("xattn", "other work", "xattn")
    assert (row["error"], row["sparse_calls"], row["density"]) == (None, 2, None)
    assert row["output_error"] == pytest.approx(0.0, abs=1e-6)
    assert row["kl_last_token"] == pytest.approx(0.0, abs=1e-6)
    assert len(row["times_ms"]) == 2
    assert row["speedup"] == pytest.approx(min(found["rows"][i]["ms"] for i in (0, 1)) / row["ms"])
    assert found["against"] == [
        {
            "name": "xattn",
            "importable": True,
            "version": "1.2",
            "settings": {"stride": 16},
            "status": f"run: {RIVALS['xattn'].note}",
        }
    ]
    # Its layers, each by itself, whatever the others do.
    assert [type(module).__name__ for module in uncompiled[-2:]] == ["LlamaDecoderLayer"] * 2


def test_speed_at_a_wrong_output_is_seen(run, model_folder, uncompiled, monkeypatch):
    def half(query, key, value, scale):
        return attend(query, key, value, scale) / 2

    found = run_against(run, model_folder, monkeypatch, half)
    row = found["rows"][-1]
    assert row["output_error"] == pytest.approx(0.5)
    assert row["kl_last_token"] > 1e-6
    assert "its attention 50.0% off dense attention" in " ".join(found["verdict"])
    assert "50.0%" in render_speed(found)
    assert "attention 50.0% off dense attention" in command.format_speed(found)


def test_what_other_work_cannot_do_stays_in_its_row(run, model_folder, uncompiled, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no kernel for this GPU")

    found = run_against(run, model_folder, monkeypatch, refuse)
    assert "no kernel for this GPU" in found["rows"][-1]["error"]
    assert found["rows"][-1]["ms"] is None
    assert found["rows"][0]["ms"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "1.5"], "--lengths must be whole numbers of at least 256 tokens, got '1.5'"),
        (["--lengths", "1024"], "--lengths must be at most the model's context, 512, got 1024"),
        (["--tokens", "1024"], "--tokens must be at most the model's context, 512, got 1024"),
        (["--tokens=5"], "--tokens must be whole numbers of at least 256 tokens, got '5'"),
        (["--quality", "slow"], "--quality must be of fast, balanced, high and numbers"),
        (["--against", "xattention"], "--against must be of minference, flex_prefill, xattn"),
        (["--compile", "all"], "'--compile': 'all' is not one of 'layers', 'model'"),
        (["--repeats", "0"], "'--repeats': 0 is not in the range x>=1"),
        (["--text", "nowhere.txt"], "a text must be a file or one of prose, code, topics, got"),
        (["--html", "."], "'--html': it must be a file, got ., a folder"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_loaded(
    run, model_folder, monkeypatch, options, message
):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("loaded"))
    ran = run("speed", model_folder, *options)
    assert (ran.code, ran.out) == (2, "")
    assert message in " ".join(ran.err.split())


def test_a_copy_shares_the_weights_and_nothing_else():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    other = measured.share_weights(model)
    pairs = zip(model.modules(), other.modules(), strict=True)
    assert all(a is not b and type(a) is type(b) for a, b in pairs)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), other.buffers(), strict=True))


def test_a_model_without_layers_is_compiled_only_as_a_whole():
    with pytest.raises(ValueError, match="compile_scope must be 'model' for Linear"):
        measured.find_layers(torch.nn.Linear(2, 2))


@pytest.mark.slow
def test_compiled_ways_say_what_the_eager_model_does(run, model_folder):
    found = timed(run, model_folder, "--min-length", "0", "--quality", "1e6")
    for row in found["rows"]:
        assert row["error"] is None
        assert row["kl_last_token"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_layers_compile_around_other_work(run, model_folder, monkeypatch):
    found = run_against(run, model_folder, monkeypatch, attend)
    assert found["rows"][-1]["error"] is None
    assert found["rows"][-1]["kl_last_token"] == pytest.approx(0.0, abs=1e-5)
