"""The tables of the files of `bench.communication`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from .. import markdown

NEEDS = {
    **dict.fromkeys(("text", "selector", "tokens", "ranks"), "{}"),
    **dict.fromkeys(("density", "needed", "least layer"), "{:.1%}"),
}
STUDY = {
    **dict.fromkeys(("tokens", "ranks"), "{}"),
    **dict.fromkeys(("dense GB", "sparse GB", "sampled rows GB", "dense s", "sparse s"), "{:.3g}"),
    "speed-up": "{:.2f}x",
    **dict.fromkeys(("dense efficiency", "sparse efficiency"), "{:.0%}"),
}
SHARES = {1.0: "every block of others needed", 0.5: "half of them needed"}
SHOWN_DENSITY, SHOWN_RANKS = 0.1, (1, 8, 64)


def describe(result: Mapping[str, Any], name: str) -> str:
    """The tables of the file."""
    names = ("text", "selector", "tokens", "ranks", "density", "needed", "needed_least_layer")
    needs = [[row[name] for name in names] for row in result["measured"]]
    parts = [
        f"{name}: SIMULATED, but for the first table; `{shlex.join(result['command'])}`",
        f"### Needs of {result['model']}, measured, mean over layers and key heads",
        markdown.table(NEEDS, needs),
    ]
    for selector in dict.fromkeys(row["selector"] for row in result["rows"]):
        for needed, title in SHARES.items():
            parts.append(f"### Simulated: {selector}, density {SHOWN_DENSITY:.0%}, {title}")
            parts.append(markdown.table(STUDY, study_lines(result, selector, needed)))
    return markdown.page(*parts)


def study_lines(result: Mapping[str, Any], selector: str, needed: float) -> Iterator[list[Any]]:
    """The study at one density, for some ranks and all lengths but the shortest."""
    shortest = min(row["tokens"] for row in result["rows"])
    for row in result["rows"]:
        shown = row["tokens"] > shortest and row["ranks"] in SHOWN_RANKS
        if row["selector"] != selector or row["density"] != SHOWN_DENSITY or not shown:
            continue
        if row["ranks"] > 1 and row["needed"] != needed:
            continue
        moved = [row[f"{kind}_bytes"] for kind in ("dense", "sparse", "sampled_rows")]
        yield [
            row["tokens"],
            row["ranks"],
            *(None if size is None else size / 1e9 for size in moved),
            *(row[name] for name in ("dense_seconds", "sparse_seconds", "speedup")),
            *(row[name] for name in ("dense_efficiency", "sparse_efficiency")),
        ]
