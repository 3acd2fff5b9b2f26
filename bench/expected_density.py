"""Measures what UniSparse keeps of SmolLM2's attention: the densities that its `cost` is fitted to.

The paper's settings at several top_p, and the default's rule at several thresholds, by the root of
a row's blocks as it is, and one for all rows.

python -m bench.expected_density [--output FILE]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from unisparse_flex import UniSparse
from unisparse_flex.evaluation import MODEL_NAME, LoadedModel, TextName, load_smollm2
from unisparse_flex.selectors import DEFAULT_SELECTOR

from .calls import capture_calls
from .quality import defaults, rows_alike
from .record import FOLDER, Record

TEXTS: tuple[TextName, ...] = ("prose", "code")
LENGTHS = (1024, 2048, 4096, 8192)
TOP_P = (0.7, 0.8, 0.9, 0.95, 0.97, 0.99)
SELECTORS: dict[str, list[Any]] = {
    "paper": [UniSparse.paper(top_p=p) for p in TOP_P],
    "default": defaults(DEFAULT_SELECTOR.block_size),
    "rows-alike": rows_alike(DEFAULT_SELECTOR.block_size),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.expected_density", description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER / "density-smollm2.json")
    options = parser.parse_args()
    loaded = load_smollm2()
    record = Record.create(
        "bench.expected_density",
        loaded.device.type,
        options.output,
        math.inf,
        model=MODEL_NAME,
        dtype=str(loaded.dtype).removeprefix("torch."),
        selectors={name: repr(settings) for name, settings in SELECTORS.items()},
    )
    with record.stopping():
        record.collect(measure(loaded))


def measure(loaded: LoadedModel) -> Iterator[dict[str, Any]]:
    """A row for each text, length and setting: the mean density of the model's calls."""
    for text in TEXTS:
        for tokens in LENGTHS:
            calls = capture_calls(loaded, text, tokens)
            for name, settings in SELECTORS.items():
                for selector in settings:
                    row = {"text": text, "tokens": tokens, "selector": name}
                    rule = ("top_p", "threshold", "threshold_blocks")
                    row |= {field: getattr(selector, field) for field in rule}
                    yield row | {
                        "density": mean(
                            selector.select(call.query, call.key, is_causal=True).density()
                            for call in calls
                        )
                    }


if __name__ == "__main__":
    main()
