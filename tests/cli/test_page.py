"""The page of `explain`: whole, escaped, and in need of nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from tests.api.models import SELECTOR, create, embeddings
from tests.api.test_explain import Mixed
from unisparse_flex import optimize
from unisparse_flex.command_line import CommandLine
from unisparse_flex.passes import DenseReason
from unisparse_flex.passes.decision.call_forecast import CallForecast
from unisparse_flex.reports import (
    AttentionRecord,
    ExplainReport,
    ReportedCall,
    quality_curve,
    render_page,
    report_model,
)
from unisparse_flex.reports.density_chart import BOTTOM, HEIGHT, LEFT, WIDTH, compute_bars
from unisparse_flex.reports.page import (
    STYLE,
    format_ms,
    format_percent,
    mark_options,
    read_part,
)
from unisparse_flex.reports.timing import CallTime
from unisparse_flex.reports.tree import build_tree

EVIL = """<script>alert("1")</script>&'<img src=x onerror=alert(2)>"""
# What makes a browser fetch something.
FETCHING_TAGS = {"script", "link", "img", "iframe", "object", "embed", "video", "audio", "base"}
FETCHING_ATTRIBUTES = {"src", "href", "xlink:href", "srcset", "action", "data", "background"}


class Page(HTMLParser):
    """The tags, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def record(layer, density=None, reason=None, prediction=None):
    return AttentionRecord(
        layer=layer,
        q_len=64,
        kv_len=128,
        heads="4/2",
        decision="dense" if density is None else "sparse",
        density=density,
        reason=reason,
        prediction=prediction,
    )


def report(*calls, **changes):
    plain = ExplainReport(
        calls=calls,
        model="tiny",
        model_class="Tiny",
        settings={"selector": "UniSparse()"},
        device="CPU",
        dtype="float32",
        versions={"torch": "2.13", "triton": None},
    )
    return replace(plain, **changes)


def prediction(dense_ms=2.0, sparse_ms=1.0, break_even=4096):
    return CallForecast(
        dense_ms=dense_ms, sparse_ms=sparse_ms, density=0.5, break_even=break_even, note=""
    )


def call(*args, time=None, module="Attention", **kwargs):
    return ReportedCall(record=record(*args, **kwargs), module=module, time=time)


@pytest.fixture(scope="module")
def mixed():
    model = optimize(create(Mixed), SELECTOR, min_length=0)
    return report_model(
        model,
        {"x": embeddings(300)},
        name="mixed",
        settings={},
        device="CPU",
        line=CommandLine("mixed"),
    )


def test_every_call_and_reason_stands_on_the_page(mixed):
    text = " ".join(Page(render_page(mixed)).text)
    for each in mixed.calls:
        assert (each.record.reason or "") in text
        if each.record.density is not None:
            assert f"{each.record.density:.1%}" in text
    assert len(mixed.calls) == 6
    assert "2 of 6" in text


def test_a_reason_stands_once_below_the_tree_as_in_the_terminal():
    same = [call(f"layers.{i}", reason=DenseReason.SLOWER) for i in range(3)]
    page = report(call("a", 0.5), *same, call("b", reason=DenseReason.NEEDS_WEIGHTS))
    text = " ".join(" ".join(Page(render_page(page)).text).split())
    assert text.count(DenseReason.SLOWER) == text.count(DenseReason.NEEDS_WEIGHTS) == 1
    assert (text.count("[1]"), text.count("[2]")) == (4, 2)
    table = " ".join(page.explanation.table().split())
    for footnote in (f"[1] {DenseReason.SLOWER} (3 calls)", f"[2] {DenseReason.NEEDS_WEIGHTS}"):
        assert footnote in text
        assert footnote in table


def test_tags_are_closed_in_their_order(mixed):
    page = Page(render_page(mixed))
    assert page.open == []
    assert page.tags.count("table") == 1


def test_names_are_escaped_wherever_they_stand():
    evil = call(f"layers.{EVIL}", 0.5, module=EVIL)
    html = render_page(
        report(
            evil,
            model=EVIL,
            model_class=EVIL,
            settings={EVIL: EVIL},
            device=EVIL,
            dtype=EVIL,
            versions={EVIL: EVIL},
        )
    )
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "".join(page.text).count(EVIL) >= 8
    assert "<script" not in html


def test_page_fetches_nothing(mixed):
    html = render_page(mixed)
    page = Page(html)
    assert not FETCHING_TAGS & set(page.tags)
    assert not FETCHING_ATTRIBUTES & {name for name, _ in page.attributes}
    for word in ("http:", "https:", "url(", "@import", "//"):
        assert word not in html
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_page_has_rules_for_dark_screens_and_for_print(mixed):
    html = render_page(mixed)
    assert "@media (prefers-color-scheme: dark)" in html
    assert "@media print" in html


def test_measured_columns_are_there_where_something_was_measured():
    plain = call("a", 0.5, prediction=prediction())
    timed = replace(plain, time=CallTime(dense_ms=3.0, sparse_ms=1.5))
    assert "measured ms" not in render_page(report(plain))
    html = render_page(report(plain, timed))
    assert "measured ms" in html
    assert "3.00 → 1.50 ms" in html


def test_options_break_at_no_hyphen():
    marked = mark_options("unisparse-flex explain a-b --text x (--dense-layers 0,3-8) <--html>")
    assert marked == (
        "<code>unisparse-flex</code> explain a-b <code>--text</code> x "
        "(<code>--dense-layers</code> 0,<code>3-8</code>) &lt;<code>--html</code>&gt;"
    )
    assert "code { font: inherit; white-space: nowrap; }" in read_part(STYLE)
    slow = record("layers.0", density=0.9, prediction=prediction(1.0, 2.0))
    fast = record("layers.1", density=0.1, prediction=prediction(3.0, 1.0))
    calls = (ReportedCall(record=each, module="", time=None) for each in (slow, fast))
    assert "(<code>--dense-layers</code> 0), for attention 2x as fast." in render_page(
        report(*calls)
    )


def test_text_in_charts_can_be_read_on_a_phone():
    narrow = read_part(STYLE).partition("@media (max-width: 500px)")[2].partition("@media")[0]
    size = re.search(r"svg text, svg text\.name { font-size: (\d+)px", narrow)
    assert size is not None
    # A chart is drawn as wide as the screen without the margins of the body, and leaves room on its
    # left for the labels of the axis, which grow beyond it.
    room = re.search(
        r"svg { width: calc\(100% - (\d+)rem\); margin: 0 0 [\d.]+rem \1rem; }", narrow
    )
    assert room is not None
    scale = (360 - 2 * 20 - 16 * int(room[1])) / WIDTH
    assert int(size[1]) * scale >= 10
    widest = len("0.0001") * 0.55 * int(size[1])
    assert (quality_curve.LEFT - 8 - widest) * scale + 16 * int(room[1]) + 20 > 0


def test_break_even_that_never_comes_is_said():
    for sparse_ms in (3.0, 1.0):
        found = prediction(sparse_ms=sparse_ms, break_even=None)
        html = render_page(report(call("a", prediction=found)))
        assert "<td>-</td>" in html
        assert "expected of the selector (-: at no length, at that density)" in html


def test_a_model_without_attention_calls_says_so():
    html = render_page(report())
    assert "no attention call was seen" in html
    assert "<svg" not in html


def test_totals_take_each_call_as_it_was_decided():
    sparse = call("a", 0.5, prediction=prediction(), time=CallTime(dense_ms=4.0, sparse_ms=3.0))
    dense = call(
        "b",
        reason=DenseReason.SLOWER,
        prediction=prediction(5.0, 7.0),
        time=CallTime(dense_ms=6.0, sparse_ms=8.0),
    )
    both = report(sparse, dense, call("c", reason=DenseReason.NEEDS_WEIGHTS))
    assert both.predicted_ms == (7.0, 6.0)
    assert both.measured_ms == (10.0, 9.0)
    assert report(call("c")).predicted_ms is None
    assert report(call("c")).measured_ms is None


def test_tree_joins_only_children_and_counts_what_is_below():
    rows = build_tree(
        [call("model.layers.0.attn", 0.25), call("model.layers.1.attn", 0.75), call("head.attn")],
        "Tiny",
    )
    assert [(row.depth, row.label, row.calls, row.sparse, row.density) for row in rows] == [
        (0, "Tiny", 3, 2, 0.5),
        (1, "model.layers", 2, 2, 0.5),
        (2, "0.attn", 1, 1, 0.25),
        (2, "1.attn", 1, 1, 0.75),
        (1, "head.attn", 1, 0, None),
    ]
    assert [row.call is None for row in rows] == [True, True, False, False, False]


def test_tree_keeps_calls_of_a_module_that_holds_others():
    calls = [call("Tiny", 0.5), call("a", 0.5), call("a", 0.5), call("a.b", 0.5)]
    rows = build_tree(calls, "Tiny")
    assert [(row.depth, row.label) for row in rows] == [
        (0, "Tiny"),
        (1, "call 1"),
        (1, "a"),
        (2, "call 1"),
        (2, "call 2"),
        (2, "b"),
    ]
    assert [row.call for row in rows if row.call] == calls


def test_bars_stand_beside_one_another_inside_the_chart():
    calls = [call(str(i), i / 40) for i in range(40)] + [call("dense")]
    bars = compute_bars(calls)
    assert len(bars) == 41
    assert bars[0].x >= LEFT
    assert all(a.x + a.width <= b.x + 0.01 for a, b in pairwise(bars))
    assert bars[-1].x + bars[-1].width <= WIDTH
    for each, bar in zip(calls, bars, strict=True):
        density = 1.0 if each.record.density is None else each.record.density
        assert bar.height == pytest.approx(density * (HEIGHT - BOTTOM), abs=0.01)
        assert bar.y + bar.height == pytest.approx(HEIGHT - BOTTOM, abs=0.02)
    assert 2 <= sum(bool(bar.label) for bar in bars) <= 16


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0.00"), (0.123, "0.12"), (12.34, "12.3"), (1234.5, "1,234")],
)
def test_milliseconds_have_three_digits(value, text):
    assert format_ms(value) == text


def test_shares_are_percents():
    assert (format_percent(None), format_percent(0.1234)) == ("–", "12.3%")
