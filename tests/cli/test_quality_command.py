"""`unisparse-flex quality`: what is measured, what is refused, and the three ways it is told."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from tests.cli.test_page import FETCHING_ATTRIBUTES, FETCHING_TAGS, Page
from unisparse_flex import Calibration
from unisparse_flex.cli import models
from unisparse_flex.cli.choices import QUALITY_NAMES
from unisparse_flex.cli.measuring import split_outside_brackets
from unisparse_flex.cli.quality import (
    BASELINES,
    LONGBENCH_NAMES,
    TASK_NAMES,
    format_quality,
    say_verdict,
)
from unisparse_flex.evaluation import LONGBENCH_NAMES as LIBRARY_LONGBENCH_NAMES
from unisparse_flex.evaluation import TASK_NAMES as LIBRARY_TASK_NAMES
from unisparse_flex.evaluation import answers, generate_together
from unisparse_flex.passes.calls import read_selector
from unisparse_flex.progress import Progress
from unisparse_flex.reports import render_quality
from unisparse_flex.reports.quality_curve import (
    CHARACTER_WIDTH,
    HEIGHT,
    LABEL_HEIGHT,
    LEAST_KL,
    WIDTH,
    compute_curve,
)

EVIL = """<script>alert("1")</script>&'<img src=x onerror=alert(2)>"""
KEYS = {
    *("schema", "kind", "model", "model_class", "weights", "densities", "device", "versions"),
    *("command", "settings", "selectors", "rows", "means", "tasks", "verdict", "notes"),
}
ROW_KEYS = {
    *("tokens", "text", "setting", "density", "sparse_calls", "windows", "calls", "judged", "kl"),
    *("perplexity", "dense_perplexity", "perplexity_ratio", "top1_agreement", "sparse_density"),
}
SMALL = "UniSparse(block_size=32, c_q=8, c_k=8, top_p=0.3)"


@pytest.fixture(scope="module")
def essay(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "essay.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. Grüße!\n" * 40, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def values(model_folder, essay, tmp_path_factory):
    """The JSON of one run at two lengths, written to a file beside the page and the table."""
    import contextlib
    import io

    from unisparse_flex.cli import main

    folder = tmp_path_factory.mktemp("written")
    output, html = folder / "new" / "quality.json", folder / "quality.html"
    arguments = ["quality", model_folder, "--text", essay, "--lengths", "512,256", "--quality"]
    arguments += ["fast,1e6", "--against", SMALL, "--output", output, "--html", html, "-q"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(argument) for argument in arguments]) == 0
    return json.loads(output.read_text()), html.read_text(encoding="utf-8"), out.getvalue()


@pytest.mark.parametrize(
    ("number", "kept"), [(5, [256] * 2), (7, [256] * 2 + [512] * 2)], ids=["text", "task"]
)
def test_what_was_judged_is_printed_where_it_is_interrupted(
    run, model_folder, essay, tmp_path, monkeypatch, number, kept
):
    steps = []

    def advance(self, step):
        steps.append(step)
        if len(steps) > number:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "advance", advance)
    (tmp_path / "hotpotqa.jsonl").write_text(
        json.dumps({"input": "Who?", "context": "A fox. " * 9, "answers": ["a fox"]})
    )
    ran = run(
        *("quality", model_folder, "--text", essay, "--lengths", "256,512", "--json", "-q"),
        *("--quality", "fast,1e6", "--longbench", tmp_path, "--samples", "1"),
    )
    assert ran.code == 130
    found = json.loads(ran.out)
    assert found["verdict"][0].startswith("Interrupted: what was not read with every setting")
    assert [row["tokens"] for row in found["rows"]] == kept
    assert found["tasks"]["LongBench"] == []
    assert "Interrupted" in format_quality(found)
    assert "Interrupted" in render_quality(found)


def test_nothing_is_printed_where_nothing_was_judged(run, model_folder, essay, monkeypatch):
    def advance(self, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "advance", advance)
    ran = run("quality", model_folder, "--text", essay, "--lengths", "256", "-q")
    assert (ran.code, ran.out) == (130, "")


def test_json_says_what_ran_where_and_with_what(values, model_folder, essay):
    found = values[0]
    assert set(found) == KEYS
    assert [set(row) for row in found["rows"]] == [ROW_KEYS] * 6
    assert (found["kind"], found["weights"], found["densities"]) == ("quality", "as loaded", "free")
    assert found["command"][:3] == ["unisparse-flex", "quality", str(model_folder)]
    assert found["versions"]["torch"]
    assert found["settings"]["lengths"] == [256, 512]
    assert found["settings"]["texts"] == [str(essay)]
    assert set(found["selectors"]) == {"fast", "1e6", SMALL}
    assert found["selectors"][SMALL] == SMALL


def test_a_setting_that_keeps_everything_changes_nothing(values):
    rows = [row for row in values[0]["rows"] if row["setting"] == "1e6"]
    assert len(rows) == 2
    for row in rows:
        assert row["density"] == 1.0
        assert row["kl"] == pytest.approx(0.0, abs=1e-6)
        assert row["perplexity_ratio"] == pytest.approx(1.0, abs=1e-5)
        assert row["top1_agreement"] == 1.0


def test_a_setting_that_drops_blocks_is_judged_by_half_of_the_prompt_at_most(values):
    rows = [row for row in values[0]["rows"] if row["setting"] == SMALL]
    for row in rows:
        assert 0 < row["density"] < 0.9
        assert row["kl"] > 1e-7
        assert row["judged"] == row["tokens"] // 2
        assert row["sparse_calls"] == row["calls"] == 2


def test_the_table_fits_80_columns_and_holds_every_row(values):
    found, _, text = values
    # A command that is named stays whole.
    lines = [line for line in text.splitlines() if not line.startswith("  unisparse-flex ")]
    assert max(map(len, lines)) <= 80
    for row in found["rows"]:
        assert f"{row['density']:.1%}" in text
        assert f"{row['perplexity']:.3f}" in text
    for sentence in found["verdict"]:
        assert sentence in " ".join(text.split())


def test_the_page_holds_every_row_and_fetches_nothing(values):
    found, html, _ = values
    page = Page(html)
    assert page.open == []
    assert not FETCHING_TAGS & set(page.tags)
    assert not FETCHING_ATTRIBUTES & {name for name, _ in page.attributes}
    for word in ("http:", "https:", "url(", "@import"):
        assert word not in html
    assert "@media (prefers-color-scheme: dark)" in html
    text = " ".join(page.text)
    for row in found["rows"]:
        assert f"{row['kl']:.4f}" in text
    assert page.tags.count("svg") == 2
    assert page.tags.count("circle") == 6
    assert found["verdict"][0] in text


def test_names_on_the_page_are_escaped(values):
    found = json.loads(json.dumps(values[0]))
    found |= {"model": EVIL, "model_class": EVIL, "verdict": [EVIL], "notes": [EVIL]}
    found["command"], found["selectors"], found["versions"] = [EVIL], {EVIL: EVIL}, {EVIL: EVIL}
    for row in (*found["rows"], *found["means"]):
        row["setting"] = EVIL
    for row in found["rows"]:
        row["text"] = EVIL
    page = Page(render_quality(found))
    assert not {"script", "img"} & set(page.tags)
    assert "".join(page.text).count(EVIL) >= 8


def test_tasks_are_scored_dense_and_sparse(run, model_folder, essay, monkeypatch, tmp_path):
    def short(*args, max_tokens, **options):
        return generate_together(*args, max_tokens=3, **options)

    monkeypatch.setattr(answers, "generate_together", short)
    # A token is a byte: the tasks need a longer context.
    for path in model_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((model_folder / "config.json").read_text())
    config["max_position_embeddings"] = 2048
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = {"input": "Who?", "context": "A fox. " * 400, "answers": ["a fox", "the fox"]}
    (tmp_path / "hotpotqa.jsonl").write_text(3 * (json.dumps(line) + "\n"), encoding="utf-8")
    options = ["--lengths", "1200", "--quality", "1e6", "--tasks", "niah_single", "--samples", "2"]
    options += ["--longbench", tmp_path]
    ran = run("quality", tmp_path, "--text", essay, *options, "--json", "-q")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    dense, kept = found["tasks"]["RULER"]
    assert dense["task"] == kept["task"] == "niah_single"
    assert (dense["setting"], kept["setting"]) == (None, "1e6")
    assert (dense["samples"], dense["density"], kept["density"]) == (2, None, 1.0)
    assert dense["score"] == kept["score"]
    assert [
        (row["task"], row["setting"], row["samples"]) for row in found["tasks"]["LongBench"]
    ] == [("hotpotqa", None, 2), ("hotpotqa", "1e6", 2)]
    for text in (render_quality(found), format_quality(found)):
        assert "niah_single" in text
        assert "hotpotqa" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "4k"], "--lengths must be whole numbers of at least 256 tokens, got '4k'"),
        (["--lengths", "12"], "--lengths must be whole numbers of at least 256 tokens, got '12'"),
        (["--lengths", ","], "--lengths must name at least one length, got ','"),
        (["--lengths", "513"], "--lengths must be at most the model's context, 512, got 513"),
        (
            ["--quality", "best"],
            "--quality must be of fast, balanced, high and numbers of at least",
        ),
        (["--quality", "0.01"], "numbers of at least 0.1, got '0.01'; 1 is balanced"),
        (["--quality", "nan"], "got 'nan'; 1 is balanced, larger ones keep more blocks"),
        (["--quality", ""], "--quality must name at least one setting, got ''"),
        (["--against", "seer"], "--against must be of paper, xattention, flexprefill"),
        (["--against", "XAttention(top_p=7)"], "--against: top_p must be in (0, 1], got 7"),
        (["--against", "open('x')"], "--against: a selector must be a call with literals by name"),
        (["--tasks", "qa"], "--tasks must be ruler (all of them) or of niah_single"),
        (
            ["--longbench", "."],
            "--longbench must be a folder with at least one of narrativeqa.jsonl",
        ),
        (["--samples", "0"], "'--samples': 0 is not in the range x>=1"),
        (["--text", "nowhere.txt"], "a text must be a file or one of prose, code, topics, got"),
        (["--html", "."], "'--html': it must be a file, got ., a folder"),
        (
            ["--output", "pyproject.toml/x.json"],
            "cannot write pyproject.toml/x.json: pyproject.toml",
        ),
        (["--dense-layers", "a"], "such as 0,1,-1 or ranges such as 0-10, got 'a'"),
        (
            ["--html", "same.x", "-o", "./same.x"],
            "--html and --output must be different files, got same.x for both",
        ),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_loaded(
    run, model_folder, monkeypatch, options, message
):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("loaded"))
    ran = run("quality", model_folder, *options)
    assert (ran.code, ran.out) == (2, "")
    assert message in " ".join(ran.err.split())


def test_a_file_too_short_is_refused_before_anything_is_loaded(
    run, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("loaded"))
    text = tmp_path / "short.txt"
    text.write_text("short", encoding="utf-8")
    ran = run("quality", model_folder, "--text", text, "--lengths", "256")
    assert ran.code == 2
    assert "got 256 for" in " ".join(ran.err.split())
    assert "a file of 5 bytes; give a longer --text" in " ".join(ran.err.split())


def test_a_model_whose_calls_all_stay_dense_says_why(run, model_folder, essay):
    ran = run(
        *("quality", model_folder, "--text", essay, "--lengths", "256", "-q"),
        *("--min-length", "4096"),
    )
    assert ran.code == 1
    message = " ".join(ran.err.split())
    assert f"cannot judge {model_folder}: no attention call ran sparse:" in message


@pytest.mark.filterwarnings("default")
def test_a_calibration_of_another_model_is_told_once_in_a_line_without_its_place(
    run, model_folder, essay, tmp_path
):
    layers = {f"model.layers.{index}.self_attn": read_selector(SMALL) for index in range(2)}
    foreign = Calibration(
        layers=layers | {"model.layers.1.self_attn": "dense"},
        quality="recall",
        target=0.9,
        reached=0.9,
        density=0.5,
        model="OtherForCausalLM",
        unisparse_flex="0",
        torch="2",
    )
    foreign.save(tmp_path / "foreign.json")
    options = ("--text", essay, "--lengths", "256,512", "--selector", tmp_path / "foreign.json")
    ran = run("quality", model_folder, *options, "-q", "--json")
    assert ran.code == 0
    assert ran.said.startswith("note: selector must be the calibration of the model that it is ")
    assert ran.said.count("OtherForCausalLM") == 1
    assert "UserWarning" not in ran.err
    assert ".py" not in ran.err
    assert max(map(len, ran.err.splitlines())) <= 80
    for row in json.loads(ran.out)["rows"]:
        assert row["density"] == pytest.approx((1 + row["sparse_density"]) / 2)


def test_a_calibration_is_named_with_its_lengths_and_what_lies_far_beyond(
    run, model_folder, essay, save_calibration
):
    path = save_calibration(2, (200, 250))
    base = ("--text", essay, "--selector", path)
    named = "calibration.json: calibrated at 200 to 250 tokens for kl 0.01, 2 layers sparse"
    for tokens, far in ((500, ""), (501, "; its target was not looked at for 501 tokens")):
        options = (*base, "--lengths", f"256,{tokens}", "-q")
        ran = run("quality", model_folder, *options)
        lines = ran.out.split("\n\n")[0].splitlines()
        assert f"{named}{far}" in " ".join(line.strip() for line in lines)
        assert max(map(len, lines)) <= 80
        values = json.loads(run("quality", model_folder, *options, "--json").out)
        assert values["selectors"] == {"calibration.json": f"{named}{far}"}
        ran = run("explain", model_folder, *base, "--tokens", tokens, "-q", "--json")
        explained = json.loads(ran.out)
        assert explained["settings"]["selector"].endswith(f"{named}{far}")


def test_names_are_those_of_the_library():
    from unisparse_flex import selectors
    from unisparse_flex.block_masks.selectors import QUALITIES

    assert TASK_NAMES == LIBRARY_TASK_NAMES
    assert LONGBENCH_NAMES == LIBRARY_LONGBENCH_NAMES
    assert tuple(QUALITIES) == QUALITY_NAMES
    assert all(
        issubclass(getattr(selectors, name), selectors.Selector) for name in BASELINES.values()
    )


def test_help_names_the_tasks_and_what_is_left_out(run):
    text = " ".join(run("quality", "--help").out.split())
    assert "where you have its files" in text
    assert "Its other data sets are left out" in text
    assert all(name in text for name in (*TASK_NAMES, *BASELINES, *LONGBENCH_NAMES))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a, b,a", ["a", "b"]),
        ("A(x=1, y=(2, 3)),b", ["A(x=1, y=(2, 3))", "b"]),
        (",,", []),
    ],
)
def test_lists_are_split_outside_of_brackets(text, parts):
    assert split_outside_brackets(text) == parts


def test_a_verdict_is_of_the_longest_length_in_the_order_of_the_rows():
    def mean(tokens, setting, ratio):
        return {
            "tokens": tokens,
            "setting": setting,
            "density": 0.34,
            "kl": 0.0123,
            "perplexity_ratio": ratio,
            "top1_agreement": 0.95,
        }

    means = [mean(8, "balanced", 2.0), mean(9, "fast", 0.9), mean(9, "balanced", 1.01)]
    means += [mean(9, "high", 1.0001), mean(9, "oracle", 1.0)]
    assert say_verdict(means, ["fast", "balanced", "high"]) == [
        "At 9 tokens fast keeps 34% of the blocks at a KL of 0.012: perplexity 10.0% below dense, "
        "95.0% of the likeliest next tokens the same.",
        "At 9 tokens balanced keeps 34% of the blocks at a KL of 0.012: perplexity 1.0% above "
        "dense, 95.0% of the likeliest next tokens the same.",
        "At 9 tokens high keeps 34% of the blocks at a KL of 0.012: perplexity as dense, 95.0% of "
        "the likeliest next tokens the same.",
    ]


@pytest.mark.parametrize(
    ("share", "said"), [(0.996, "99.6%"), (0.99951, "99.9%"), (1.0, "100.0%"), (0.94, "94.0%")]
)
def test_all_of_the_likeliest_tokens_are_the_same_only_where_they_are(share, said):
    mean = {"tokens": 9, "setting": "high", "density": 0.3, "kl": 0.001}
    (verdict,) = say_verdict([mean | {"perplexity_ratio": 1.0, "top1_agreement": share}], ["high"])
    assert verdict.endswith(f", {said} of the likeliest next tokens the same.")


def test_a_setting_that_keeps_nearly_all_is_said_to_gain_nothing(values):
    def mean(setting, density):
        return {"tokens": 9, "setting": setting, "density": density, "kl": 1e-9} | {
            "perplexity_ratio": 1.0,
            "top1_agreement": 1.0,
        }

    means = [mean("fast", 0.9949), mean("balanced", 0.996), mean("1e6", 1.0)]
    fast, balanced, all_kept, why = say_verdict(means, ["fast", "balanced", "1e6"])
    assert "at a KL of" in fast
    assert balanced == "At 9 tokens balanced keeps 99.6% of the blocks and gains nothing."
    assert all_kept == "At 9 tokens 1e6 keeps 100% of the blocks and gains nothing."
    assert why == (
        "Attention is diffuse here, as it is in short prompts and with random weights: under these "
        "settings it keeps nearly all blocks; unisparse-flex calibrate MODEL TEXT --kl 0.01 looks "
        "for others, within a loss that you state."
    )
    # A number may ask for all of them; a window that is whole chose nothing.
    assert len(say_verdict(means[2:], ["1e6"])) == 1
    assert "at a KL of" in say_verdict(means[1:2], ["balanced"], {"balanced"})[0]
    assert "1e6 keeps 100% of the blocks and gains nothing." in " ".join(values[2].split())


def test_points_of_the_curve_lie_inside_the_chart_by_density_and_divergence():
    means = [
        {"setting": str(n), "density": n / 4, "kl": kl}
        for n, kl in enumerate((1.0, 0.1, 0.02, 0.001, 0.0))
    ]
    curve = compute_curve(means, dial=["0", "1", "2", "3"])
    assert all(0 < point.x < WIDTH and 0 < point.y < HEIGHT for point in curve.points)
    assert [point.x for point in curve.points] == sorted(point.x for point in curve.points)
    assert [point.y for point in curve.points] == sorted(point.y for point in curve.points)
    assert [point.kind for point in curve.points] == ["dial"] * 4 + ["other"]
    assert len(curve.line.split()) == 4
    assert [tick.label for tick in curve.divergences[:2]] == ["0", "1e-05"]
    assert curve.points[4].y == curve.divergences[0].at
    assert re.fullmatch(r"\d+%", curve.densities[-1].label)


def test_the_least_tick_is_0_only_where_a_divergence_is_drawn_higher_than_it_is():
    def least(kl):
        mean = {"setting": "high", "density": 1.0, "kl": kl}
        return compute_curve([mean], dial=["high"]).divergences[0].label

    assert [least(kl) for kl in (0.0, LEAST_KL / 2, LEAST_KL, 3e-6)] == ["0", "0", *["1e-06"] * 2]


@pytest.mark.parametrize("density", [0.0, 0.2, 0.79, 1.0])
@pytest.mark.parametrize("names", [("high",), ("fast", "balanced", "high")])
def test_labels_lie_on_no_number_or_name_of_the_axis(density, names):
    means = [{"setting": name, "density": density, "kl": 0.0} for name in names]
    curve = compute_curve(means, dial=names)
    written = [
        (tick.at - CHARACTER_WIDTH * len(tick.label) / 2, tick.label, curve.tick_line)
        for tick in curve.densities
    ]
    written.append((curve.right - CHARACTER_WIDTH * len(curve.name), curve.name, curve.name_line))
    for point in curve.points:
        width = CHARACTER_WIDTH * len(point.label)
        left = point.label_x if point.anchor == "start" else point.label_x - width
        for start, text, line in written:
            beside = left + width <= start or start + CHARACTER_WIDTH * len(text) <= left
            assert beside or abs(point.label_y - line) >= LABEL_HEIGHT


@pytest.mark.parametrize("density", [0.01, 0.5, 0.97])
def test_labels_of_near_points_of_the_curve_lie_apart(density: float) -> None:
    names = ("fast", "balanced", "high")
    means = [
        {"setting": name, "density": density + n / 100, "kl": 0.02 - n / 1000}
        for n, name in enumerate(names)
    ]
    points = compute_curve(means, dial=names).points
    boxes = []
    for point in points:
        width = CHARACTER_WIDTH * len(point.label)
        left = point.label_x if point.anchor == "start" else point.label_x - width
        assert left >= 0
        assert left + width <= WIDTH
        boxes.append((left, left + width, point.label_y))
    for first, second in itertools.combinations(boxes, 2):
        beside = first[1] <= second[0] or second[1] <= first[0]
        assert beside or abs(first[2] - second[2]) >= LABEL_HEIGHT
