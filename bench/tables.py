"""Markdown tables and plots from the files of the benchmarks, or the tables of a page.

python -m bench.tables [FILE ...] [--join] [--plots docs | --no-plots] [--selector NAME]
python -m bench.tables --page docs/evidence/performance-tables.md

Without files, those in bench/results. Tables go to the screen, plots into a folder as PNG; or the
tables of a page are written anew, each between a comment that names its files, or one of `OTHERS`,
and the next comment.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path

from unisparse_flex.passes import DenseReason
from unisparse_flex.passes.masks import Unproved

from . import markdown
from .figures import front_sentences, front_tables
from .record import FOLDER
from .registry import BENCHMARKS, benchmark_of, describe, files_of, read

FILES = r"tables of [\w. -]+?"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--join", action="store_true", help="all files as one")
    parser.add_argument("--plots", type=Path, default=Path("docs"), help="where PNGs go")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--selector", help="settings that are plotted, or whose line is thick")
    parser.add_argument("--page", type=Path, help="writes the tables of this page, and no plots")
    options = parser.parse_args(arguments)
    if options.page is not None:
        options.page.write_text(fill(options.page.read_text()))
        return
    described = [benchmark.name for benchmark in BENCHMARKS if benchmark.describe is not None]
    results = read(options.files or files_of(*described))
    if not results:
        raise SystemExit(f"bench.tables: no files of {', '.join(described)} in {FOLDER}")
    for files in [results] if options.join else [{name: results[name]} for name in results]:
        try:
            print(describe(files))
        except ValueError as error:
            raise SystemExit(f"bench.tables: {error}") from error
        name, result = next(iter(files.items()))
        draw = benchmark_of(result, name).draw
        if draw is not None and not options.no_plots:
            for plot in draw(files, options.plots, options.selector):
                print(f"plotted {plot}\n")


def fill(page: str) -> str:
    """The page with its tables written anew, from the files of bench/results that it names."""
    return markdown.fill(page, SECTIONS, write_section)


def write_section(name: str) -> str:
    """The tables of a section: of the files that it names, or one of `OTHERS`."""
    if name in OTHERS:
        return OTHERS[name]()
    return describe(read(FOLDER / file for file in name.removeprefix("tables of ").split()))


def describe_reasons(reasons: type[StrEnum]) -> str:
    """Names and texts of every reason for which a call stays dense, or a mask a tensor."""
    rows = [(member.name, member.value) for member in reasons]
    return markdown.table({"name": "`{}`", "says": "{}"}, rows) + "\n"


# Sections that name no files.
OTHERS: dict[str, Callable[[], str]] = {
    "reasons": partial(describe_reasons, DenseReason),
    "unproved": partial(describe_reasons, Unproved),
    "dial": front_tables.dial_table,
    "claims": front_tables.claims_table,
    "speed": front_tables.speed_table,
    "gain": front_tables.gain_list,
    "decisions": front_sentences.decisions_sentence,
    "equal KL": front_sentences.equal_sentence,
    "rivals": front_sentences.rivals_sentence,
    "all lengths": front_sentences.lengths_sentence,
    "coverage": front_tables.coverage_table,
}
SECTIONS = "|".join([FILES, *OTHERS])


if __name__ == "__main__":
    main()
