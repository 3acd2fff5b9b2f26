"""The rows of `bench.quality` as curves: one point for every setting, mean over excerpts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

from ..figures import interpolate

Result = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One setting of a selector on one text, mean over excerpts.

    Attributes:
        parameters: The setting.
        density: Kept over causal blocks.
        kl: KL to the dense model, in nats.
        perplexity_ratio: Perplexity over the dense model's.
        recall: Dense attention mass in kept blocks, of the excerpts judged by it; else ``None``.
        output_error: Relative error of attention's output by the selection, likewise.
        selection_share: Selection over selection and attention in time, likewise.
        selection_by: What was timed as selection, as in `selection_share.Timed`; empty for nothing.
        excerpts: How many were read.
    """

    parameters: str
    density: float
    kl: float
    perplexity_ratio: float
    recall: float | None
    output_error: float | None
    selection_share: float | None
    selection_by: str
    excerpts: int

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Point:
        """The mean of the rows of one setting and text."""
        names = ("density", "kl", "perplexity_ratio", "recall", "output_error", "selection_share")
        means: dict[str, Any] = {name: _mean([row.get(name) for row in rows]) for name in names}
        return cls(
            **means,
            parameters=rows[0]["parameters"],
            selection_by=rows[0].get("selection_by", ""),
            excerpts=len(rows),
        )


def curve(result: Result, selector: str, text: str) -> list[Point]:
    """The points of one selector on one text, by density."""
    settings: dict[str, list[Row]] = {}
    for row in result["rows"]:
        if row["selector"] == selector and row.get("text") == text and "kl" in row:
            settings.setdefault(row["parameters"], []).append(row)
    return sorted(map(Point.of, settings.values()), key=lambda point: point.density)


def density_at(points: Sequence[Point], kl: float) -> float | None:
    """The density at which a curve has this KL, between two points in its logarithm."""
    for few, many in pairwise(points):
        if min(few.kl, many.kl) > 0 and many.kl <= kl <= few.kl:
            span = math.log(few.kl) - math.log(many.kl)
            part = 0.0 if span == 0 else (math.log(few.kl) - math.log(kl)) / span
            return few.density + part * (many.density - few.density)
    return None


def kl_at(points: Sequence[Point], density: float) -> float | None:
    """The KL of a curve at this density, between two points in its logarithm."""
    return interpolate([(point.density, point.kl) for point in points], density)


def texts_of(result: Result) -> list[str]:
    return list(dict.fromkeys(row["text"] for row in result["rows"] if row.get("text")))


def selectors_of(result: Result) -> list[str]:
    return list(dict.fromkeys(row["selector"] for row in result["rows"] if "kl" in row))


def _mean(values: Sequence[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return mean(given) if given else None
