"""What the commands for one's own model print, as files: quality and speed.

python -m bench.commands quality smollm2 --output bench/results/command-quality-smollm2-cpu.json
python -m bench.commands speed MODEL [...] --output bench/results/command-speed-MODEL-cpu.json

The arguments are those of the command unisparse-flex, which does the same.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from unisparse_flex import cli

from . import markdown
from .markdown import percent

COMMANDS = ("quality", "speed")


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in COMMANDS:
        print(__doc__)
        raise SystemExit(0 if given in (["-h"], ["--help"]) else 2)
    raise SystemExit(cli.main(given))


def describe(result: Mapping[str, Any], name: str) -> str:
    """The table of one file."""
    device = result["device"]
    # Files of a model whose weights are known to be real say so.
    weights = "real weights" if result["weights"] == "real" else f"weights {result['weights']}"
    title = (
        f"{name}: {result['model_class']}, {weights}, {result['densities']} "
        f"densities, {device['dtype']} on {device['name']}"
    )
    columns, keys = COLUMNS[result["kind"]]
    lines = [[row[key] for key in keys] for row in result["rows"]]
    return markdown.page(*markdown.heading(title, result), markdown.table(columns, lines))


COLUMNS: dict[str, tuple[dict[str, markdown.Format], tuple[str, ...]]] = {
    "quality": (
        {
            **dict.fromkeys(("tokens", "text", "setting"), "{}"),
            "density": percent,
            "KL": "{:.4f}",
            "perplexity ratio": "{:.3f}",
            "top-1": percent,
            "calls sparse": "{}",
            "of them whole windows": "{}",
        },
        (
            *("tokens", "text", "setting", "density", "kl", "perplexity_ratio", "top1_agreement"),
            *("sparse_calls", "windows"),
        ),
    ),
    "speed": (
        {
            **dict.fromkeys(("tokens", "run"), "{}"),
            "ms": "{:.1f}",
            "over dense": "{:.2f}x",
            "density": percent,
            "calls sparse": "{}",
        },
        ("tokens", "name", "ms", "speedup", "density", "sparse_calls"),
    ),
}


if __name__ == "__main__":
    main()
