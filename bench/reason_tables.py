"""The tables of docs/pass.md: every reason for which a call stays dense or a mask a tensor.

python -m bench.reason_tables [--page docs/pass.md]
"""

from __future__ import annotations

import argparse
import re
from enum import StrEnum
from pathlib import Path

from unisparse_flex.passes import DenseReason
from unisparse_flex.passes.masks import Unproved

from .tables import markdown

TABLES: dict[str, type[StrEnum]] = {"reasons": DenseReason, "unproved": Unproved}
SECTION = r"(?P<start><!-- (?P<name>reasons|unproved) -->)(?:(?!<!--).)*(?P<end><!-- end -->)"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.reason_tables", description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/pass.md"))
    page: Path = parser.parse_args(arguments).page
    page.write_text(fill(page.read_text()))


def fill(page: str) -> str:
    """The page with its tables written anew."""

    def table(match: re.Match[str]) -> str:
        rows = [[f"`{member.name}`", member.value] for member in TABLES[match["name"]]]
        return f"{match['start']}\n\n{markdown(['name', 'says'], rows)}\n\n{match['end']}"

    return re.sub(SECTION, table, page, flags=re.DOTALL)


if __name__ == "__main__":
    main()
