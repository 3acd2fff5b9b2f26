"""The default at its own setting, over models and lengths: one line for each text of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unisparse_flex.passes.calls import decode_selector
from unisparse_flex.selectors import DEFAULT_SELECTOR

from .quality_curves import Point, Result, curve, density_at, kl_at, texts_of
from .tables import markdown

OURS = "unisparse-default"
# Whose density ours is compared with, at equal KL.
RIVALS = ("unisparse-paper", "xattention", "oracle")
HEAD = (
    *("model, tokens, text (excerpts)", "density", "KL", "perplexity ratio"),
    *("of the paper's density", "of xattention's", "of the oracle's (of its KL)"),
)


def join(results: Sequence[Result]) -> Mapping[str, Any]:
    """A section's files: one as it is, several for `summary_table`."""
    return results[0] if len(results) == 1 else {"results": list(results)}


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
    return markdown(HEAD, lines)


def _is(parameters: str, selector: str | None) -> bool:
    """Whether a setting is the one looked for; a file may be older than some of its fields."""
    if selector is not None:
        return parameters == selector
    return decode_selector(parameters) == DEFAULT_SELECTOR


def _line(result: Result, text: str, own: Point) -> list[str]:
    shares = []
    for rival in RIVALS:
        other = density_at(curve(result, rival, text), own.kl)
        shares.append("" if other is None else f"{own.density / other:.2f}")
    kl = kl_at(curve(result, "oracle", text), own.density)
    shares[-1] += f" ({own.kl / kl:.2f})" if kl else ""
    return [
        f"{result['model']}, {result['tokens']}, {text} ({own.excerpts})",
        f"{own.density:.3f}",
        f"{own.kl:.4f}",
        f"{own.perplexity_ratio:.4f}",
        *shares,
    ]
