"""Who compiles a model none of whose attention is sparse is told so, and why."""

from __future__ import annotations

import logging
import textwrap
from collections import Counter

from ..decision import DenseReason, say_reasons
from .report import RewriteReport

logger = logging.getLogger(__name__)

COLUMNS = 80
# With a sign in place of the space, at which no line is broken.
EXPLAIN = "print(unisparse_flex.explain(model,\0inputs))"
_sparse: set[str] = set()
_told: set[tuple[frozenset[str], DenseReason]] = set()


def warn_of_dense(
    report: RewriteReport, settings: frozenset[str], *, may_decode: bool = False
) -> None:
    """Warns of a graph all of whose attention stays dense, once for the same settings and reason.

    Not where another graph with these settings is sparse: one of a longer prompt, or layer.

    Args:
        report: What was done to the graph.
        settings: `settings_in` the graph.
        may_decode: Whether calls of few queries may be decoding, which is dense beside prompts.
    """
    if report.rewritten:
        _sparse.update(settings)
    reasons = Counter(report.left.values())
    # Of what is excluded somebody knows already.
    expected = {DenseReason.EXCLUDED} | ({DenseReason.FEW_QUERIES} if may_decode else set())
    if report.rewritten or not settings - _sparse or not set(reasons) - expected:
        return
    reason = reasons.most_common(1)[0][0]
    if (settings, reason) in _told:
        return
    _told.add((settings, reason))
    total = reasons.total()
    calls = f"all {total} attention calls stay" if total > 1 else "the only attention call stays"
    logger.warning(
        textwrap.fill(
            f"nothing of a compiled graph is sparse: {calls} dense{say_reasons(reasons)}; "
            f"{EXPLAIN} says what to do",
            COLUMNS,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        ).replace("\0", " ")
    )
