"""A report as one page of HTML that needs nothing else: no script, no file, no network."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ..shares import say_tenths
from . import density_chart
from .explain_report import ExplainReport
from .explain_table import REST_RUN, count_reasons, describe_sparse_from, say_sparse_from
from .tree import build_tree

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from markupsafe import Markup

OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z-]*|unisparse-flex|\d+-\d+(?:,\d[\d,-]*)?)(?![\w-])")
TEMPLATE, STYLE = "page.html.jinja", "page.css"


def render_page(report: ExplainReport) -> str:
    """Renders a report for browsers and printers; everything in it is escaped.

    Args:
        report: What `report_model` found.

    Returns:
        A whole HTML document.

    Raises:
        ModuleNotFoundError: Jinja2 is not installed; the extra ``cli`` has it.
    """
    chart = {"width": density_chart.WIDTH, "height": density_chart.HEIGHT}
    chart |= {"left": density_chart.LEFT, "bottom": density_chart.BOTTOM}
    records = [call.record for call in report.calls]
    note = describe_sparse_from(records)
    return _template().render(
        report=report,
        explanation=report.explanation,
        rows=build_tree(report.calls, report.model_class),
        reasons=count_reasons(records),
        sparse_from_note=note[:1].upper() + note[1:],
        rest_run=REST_RUN,
        bars=density_chart.compute_bars(report.calls),
        chart=chart,
        style=read_part(STYLE),
    )


@cache
def _template() -> Template:
    return create_environment().from_string(read_part(TEMPLATE))


def create_environment() -> Environment:
    """Creates what templates of pages are made with: everything in them is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "ms": format_ms,
        "percent": format_percent,
        "sparse_from": say_sparse_from,
        "options": mark_options,
    }
    return environment


def mark_options(text: str) -> Markup:
    """The text with options, and the command's own name, in what breaks at no hyphen."""
    from markupsafe import Markup, escape

    return Markup(OPTION.sub(r"<code>\g<0></code>", str(escape(text))))


def format_ms(milliseconds: float | None) -> str:
    """Milliseconds with three digits; an en dash for ``None``."""
    if milliseconds is None:
        return "–"
    return f"{milliseconds:,.{max(0, 3 - len(str(int(milliseconds))))}f}"


def format_percent(share: float | None) -> str:
    """A share of 1 in percent; an en dash for ``None``."""
    return "–" if share is None else say_tenths(share)


def read_part(name: str) -> Any:
    """The text of a template or style sheet of this package."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
