from __future__ import annotations

from typing import Any

from bench.wide_logits import format_table


def test_numbers_of_another_version_stand_beside_those_of_the_same_length_and_gain() -> None:
    row: dict[str, Any] = {"tokens": 8192, "gain": 6.0, "logit_deviation": 117.0}
    row |= {"density": 0.2, "density_reference": 0.2, "differing": 0.0, "selection_ms": 0.1}
    before = [row | {"density": 0.98}, row | {"gain": 4.0, "density": 0.5}]
    header, line = format_table([row | {"whole_ms": None}], before).splitlines()
    assert line.split()[5:] == ["0.2000", "(0.9800)", "0.1000", "(0.1000)", "-", "(-)"]
    assert len(header) == len(line)
    assert "(" not in format_table([row])
