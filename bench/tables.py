"""Markdown tables and plots from the files of the benchmarks, or the tables of a page.

python -m bench.tables [FILE ...] [--join] [--plots docs | --no-plots] [--selector NAME]
python -m bench.tables --page docs/performance.md

Without files, those in bench/results. Tables go to the screen, plots into a folder as PNG; or the
tables of a page are written anew, each between a comment that names its files and the next comment.
"""

from __future__ import annotations

import argparse
from enum import StrEnum
from pathlib import Path

from unisparse_flex.passes import DenseReason
from unisparse_flex.passes.masks import Unproved

from . import markdown
from .record import FOLDER
from .registry import BENCHMARKS, benchmark_of, describe, files_of, read

FILES = r"tables of [\w. -]+?"
# Sections that name no files: every reason for which a call stays dense or a mask a tensor.
REASONS: dict[str, type[StrEnum]] = {"reasons": DenseReason, "unproved": Unproved}
SECTIONS = "|".join([FILES, *REASONS])


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
    """The tables of a section: of the files that it names, or of `REASONS`."""
    if name in REASONS:
        rows = [(member.name, member.value) for member in REASONS[name]]
        return markdown.table({"name": "`{}`", "says": "{}"}, rows) + "\n"
    return describe(read(FOLDER / file for file in name.removeprefix("tables of ").split()))


if __name__ == "__main__":
    main()
