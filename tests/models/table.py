"""`docs/coverage.md`: how the found cells are written down, and what of it must not change."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from unisparse_flex.passes import DenseReason

from .cells import Cell
from .families import FAMILIES
from .family import LENGTH, SELECTOR

DOCUMENT = Path(__file__).parents[2] / "docs" / "coverage.md"
ERRORS = re.compile(r"( \| (1e-\d+|0)){2} \|$", re.MULTILINE)

Cells = Mapping[tuple[str, str], Cell]

INTRODUCTION = """\
# Coverage

What `unisparse_flex.optimize` does to the attention of each model family, found by running tiny \
models with random weights (two layers, {length} tokens, `{selector}`) on a CPU. \
`tests/models/test_coverage.py` computes this table and fails where it no longer holds; \
`pytest tests/models/test_coverage.py --write-coverage` writes it.

- *sparse*, *dense*: attention calls of one run (of a compiled or exported model: nodes of its \
graphs). Prefill is sparse, decoding dense: three steps here.
- *error*: relative root mean square error of the output (logits, hidden states) against the \
float64 model with the same blocks, as a power of ten. Each is within three times the error of \
float32 attention written out plainly.
- *top_p=1*: the same against the untouched model where every block is kept.
- Compiled and exported models have no graph break: `fullgraph=True`.
"""

MASKS = """\
## Masks

What the masks of the sparse nodes were proved to be in compiled and exported models. What is \
proved becomes a formula, the rest stays a *tensor*, with the reason.

- *everything*: the mask hides nothing. *is_causal*, *none*: the call carries no mask.
- *kept whole*: a sliding window of so few blocks that there is nothing to select.
- *causal* is any bound on how far ahead a row sees: a two-sided window (ModernBERT: 32 keys to \
either side) is one too, and is not kept whole.

| family | mode | sparse nodes |
|---|---|---|"""


def render(cells: Cells) -> str:
    """The whole document."""
    parts = [
        INTRODUCTION.format(length=LENGTH, selector=SELECTOR),
        _without_sparse_calls(cells),
        _table(cells),
        _masks(cells),
        _reasons(cells),
        _notes(),
    ]
    return "\n".join(parts)


def decisions(document: str) -> str:
    """The document without its errors, which differ from machine to machine."""
    return ERRORS.sub("", document)


def _without_sparse_calls(cells: Cells) -> str:
    sparse = {name for (name, _), cell in cells.items() if cell.sparse}
    left = [family.name for family in FAMILIES if family.name not in sparse]
    return f"Nothing is sparse in: {', '.join(left) or 'none'}.\n"


def _table(cells: Cells) -> str:
    lines = [
        "| family | mode | sparse | dense | error | top_p=1 |",
        "|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        for index, mode in enumerate(family.modes):
            cell = cells[family.name, mode]
            dense = ", ".join(f"{n} {reason.name}" for reason, n in cell.dense.items())
            row = (
                "" if index else family.name,
                mode,
                str(cell.sparse),
                dense or ("0" if cell.sparse else "no SDPA call"),
                _power_of_ten(cell.error),
                _power_of_ten(cell.full_error),
            )
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _masks(cells: Cells) -> str:
    lines = [MASKS]
    for family in FAMILIES:
        modes: dict[str, list[str]] = {}
        for mode in family.modes:
            cell = cells[family.name, mode]
            if cell.graphs:
                kinds = "; ".join(f"{count} {kind}" for kind, count in cell.masks.items())
                modes.setdefault(kinds or "0", []).append(mode)
        for index, (kinds, same) in enumerate(modes.items()):
            lines.append(f"| {'' if index else family.name} | {'; '.join(same)} | {kinds} |")
    return "\n".join(lines) + "\n"


def _power_of_ten(error: float) -> str:
    return f"1e{round(math.log10(error))}" if error else "0"


def _reasons(cells: Cells) -> str:
    met = {reason for cell in cells.values() for reason in cell.dense}
    lines = [f"- `{reason.name}`: {reason.value}" for reason in DenseReason if reason in met]
    return "\n".join(["## Reasons", "", *lines]) + "\n"


def _notes() -> str:
    lines = [f"- {family.name}: {family.note}" for family in FAMILIES if family.note]
    return "\n".join(["## Families", "", *lines]) + "\n"
