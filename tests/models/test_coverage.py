"""Every family in every mode: how much is sparse, why the rest is not, and that all is right."""

from __future__ import annotations

from functools import cache

import pytest

from .cells import Cell, compute_cell
from .families import BY_NAME, FAMILIES
from .table import DOCUMENT, decisions, render

CELLS = [(family.name, mode) for family in FAMILIES for mode in family.modes]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@cache
def found(family: str, mode: str) -> Cell:
    return compute_cell(BY_NAME[family], mode)


@pytest.mark.parametrize(("family", "mode"), CELLS)
def test_attention_is_right_over_its_blocks_and_with_all_of_them(family: str, mode: str) -> None:
    cell = found(family, mode)
    assert cell.error <= 3 * cell.plain_error
    assert cell.full_error <= 3 * cell.plain_error
    # With a layer whose window is whole, what is generated may read nothing that was left out.
    generates = "generate" in mode or mode == "beam search"
    is_exact = cell.sparse == cell.windows or (cell.windows and generates)
    assert is_exact or cell.change > 5e-3


@pytest.mark.timeout(600)
def test_the_table_in_the_documentation_is_what_was_found(pytestconfig: pytest.Config) -> None:
    document = render({key: found(*key) for key in CELLS})
    if pytestconfig.getoption("--write-coverage"):
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document, encoding="utf-8")
    assert decisions(DOCUMENT.read_text(encoding="utf-8")) == decisions(document)
