"""The default at its own setting, over models and lengths: one line for each text of a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unisparse_flex.passes.calls import decode_selector
from unisparse_flex.selectors import DEFAULT_SELECTOR

from .. import markdown
from .curves import Point, Result, curve, density_at, kl_at, texts_of

OURS = "unisparse-default"
# Whose density ours is compared with, at equal KL.
RIVALS = ("unisparse-paper", "xattention", "oracle")
COLUMNS = {
    "model, tokens, text (excerpts)": "{}",
    "density": "{:.3f}",
    "KL": "{:.4f}",
    "perplexity ratio": "{:.4f}",
    "of the paper's density": "{:.2f}",
    "of xattention's": "{:.2f}",
    "of the oracle's (of its KL)": "{}",
}


def describe_together(results: Sequence[Result], _name: str) -> str:
    """The summary of several files."""
    return markdown.page(summary_table(results))


def summary_table(results: Sequence[Result], selector: str | None = None) -> str:
    """What the default keeps and costs, and what others need for the same KL.

    Args:
        results: Files of `bench.quality`, in the order of the lines.
        selector: The setting that is looked for; `DEFAULT_SELECTOR` by default.
    """
    lines = []
    for result in results:
        for text in texts_of(result):
            points = [p for p in curve(result, OURS, text) if _is(p.parameters, selector)]
            lines += [_line(result, text, point) for point in points]
    return markdown.table(COLUMNS, lines)


def _is(parameters: str, selector: str | None) -> bool:
    """Whether a setting is the one looked for; a file may be older than some of its fields."""
    if selector is not None:
        return parameters == selector
    return decode_selector(parameters) == DEFAULT_SELECTOR


def _line(result: Result, text: str, own: Point) -> list[Any]:
    shares: list[Any] = []
    for rival in RIVALS:
        other = density_at(curve(result, rival, text), own.kl)
        shares.append(None if other is None else own.density / other)
    of_oracle = "" if shares[-1] is None else f"{shares[-1]:.2f}"
    kl = kl_at(curve(result, "oracle", text), own.density)
    if kl:
        of_oracle += f" ({own.kl / kl:.2f})"
    head = f"{result['model']}, {result['tokens']}, {text} ({own.excerpts})"
    return [head, own.density, own.kl, own.perplexity_ratio, *shares[:-1], of_oracle]
