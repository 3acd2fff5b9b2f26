"""Files of `bench.choice` as curves: density by KL, and the time at an equal KL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, mean
from typing import Any

from ..figures import place_of
from .choices import Choice
from .seconds import Clock, Shape

Result = Mapping[str, Any]
LONG = 131072
DEFAULT, DEFAULT_THRESHOLD = "none/r4+p16", 0.006
# The default's KL, and parts of it.
PARTS = (1.0, 0.5, 0.25)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One threshold of a choice: means over the excerpts, geometric ones of KL.

    Attributes:
        threshold: As in the library's rule.
        density: Kept over visible blocks.
        kl: In nats.
        score_rows: What scoring cost, in rows.
        sorted_share: Of the layers, where keys were sorted.
    """

    threshold: float
    density: float
    kl: float
    score_rows: float
    sorted_share: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """A choice at a stated KL.

    Attributes:
        density: Where its curve has it.
        score_rows: What scoring costs there.
        sorted_share: See `Point`.
    """

    density: float
    score_rows: float
    sorted_share: float = 1.0


Excerpt = tuple[str, int]


def curve(result: Result, choice: str, excerpt: Excerpt | None = None) -> list[Point]:
    """The points of a choice at which every excerpt was read, or one of them, by density."""
    excerpts = excerpts_of(result) if excerpt is None else [excerpt]
    found: dict[float, dict[tuple[str, int], Mapping[str, Any]]] = {}
    for row in result["rows"]:
        if row["choice"] == choice and row.get("kl") and (row["text"], row["seed"]) in excerpts:
            found.setdefault(row["threshold"], {})[row["text"], row["seed"]] = row
    sorted_layers = Choice.parse(choice).sorted_layers
    # Not every row says what each layer kept.
    layers = max((len(row.get("densities", ())) for row in result["rows"]), default=0)
    share = min(1.0, sorted_layers / layers) if sorted_layers and layers else 1.0
    points = [
        Point(
            threshold=threshold,
            density=mean(row["density"] for row in rows.values()),
            kl=geometric_mean([row["kl"] for row in rows.values()]),
            score_rows=mean(row["score_rows"] for row in rows.values()),
            sorted_share=share,
        )
        for threshold, rows in found.items()
        if len(rows) == len(excerpts)
    ]
    return sorted(points, key=lambda point: point.density)


def reach(points: Sequence[Point], kl: float) -> Reached | None:
    """Where a curve has a KL; ``None`` where it does not reach it."""
    density = place_of([(point.density, point.kl) for point in points], kl)
    if density is None:
        return None
    nearest = min(points, key=lambda point: abs(math.log(point.kl / kl)))
    return Reached(
        density=density, score_rows=nearest.score_rows, sorted_share=nearest.sorted_share
    )


def density_ratios(result: Result, choice: str, part: float) -> list[float]:
    """Of every excerpt: the density of a choice over the default's at a part of its KL there."""
    found = []
    for excerpt in excerpts_of(result):
        kl = default_kl(result, excerpt)
        if kl is None:
            continue
        own, usual = (reach(curve(result, n, excerpt), part * kl) for n in (choice, DEFAULT))
        if own is not None and usual is not None:
            found.append(own.density / usual.density)
    return found


def default_kl(result: Result, excerpt: Excerpt | None = None) -> float | None:
    """That of the default's own setting."""
    points = curve(result, DEFAULT, excerpt)
    return next((p.kl for p in points if p.threshold == DEFAULT_THRESHOLD), None)


def seconds(choice: Choice, reached: Reached, clock: Clock) -> float:
    """Choosing and attending."""
    choosing = clock.choosing(choice, reached.score_rows, reached.sorted_share)
    return choosing + clock.attending(reached.density, choice.tile)


def shapes_of(result: Result) -> list[Shape]:
    """The model's own heads where they were timed, and Llama's, at the file's length.

    Where that is long, Llama's at 131072 tokens too, taken to need the same density.
    """
    own = (result["heads"], result["kv_heads"], result["head_dim"])
    llama, tokens = (32, 8, 128), result["tokens"]
    longer = [(llama, LONG)] if 4 * tokens >= LONG else []
    found = []
    for (heads, kv_heads, width), length in [(own, tokens), (llama, tokens), *longer]:
        shape = Shape(q_heads=heads, kv_heads=kv_heads, head_dim=width, tokens=length)
        try:
            Clock.of(shape)
        except ValueError:
            continue
        found.append(shape)
    return found


def excerpts_of(result: Result) -> list[Excerpt]:
    """Texts and seeds."""
    return list(dict.fromkeys((row["text"], row["seed"]) for row in result["rows"]))


def choices_of(result: Result) -> list[str]:
    return list(dict.fromkeys(row["choice"] for row in result["rows"]))
