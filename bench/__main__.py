"""Lists the benchmarks, or runs one.

python -m bench [--list]
python -m bench NAME [ARGUMENTS]
"""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
# What writes the tables of each page was called otherwise before one module wrote them all.
RENAMED = dict.fromkeys(("quality_tables", "reason_tables", "video_tables"), "tables")


@dataclass(frozen=True, slots=True)
class Entry:
    """Something that can be run.

    Attributes:
        module: As ``python -m`` takes it.
        purpose: What it says of itself in its first line.
    """

    module: str
    purpose: str


def find_benchmarks() -> dict[str, Entry]:
    """What can be run by its name, which is that of its module; of its folder for a `measure`."""
    found = {}
    for path in HERE.rglob("[!_]*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            place = path.parent if path.name == "measure.py" else path.with_suffix("")
            module = ".".join(place.relative_to(HERE.parent).parts)
            purpose = (ast.get_docstring(tree) or "").partition("\n")[0]
            found[place.name] = Entry(module, purpose)
    return dict(sorted(found.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a benchmark; 2 where there is none of that name."""
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--list"]
    benchmarks = find_benchmarks()
    name = RENAMED.get(name, name)
    if name in ("--list", "--help", "-h"):
        width = max(map(len, benchmarks))
        for each, entry in benchmarks.items():
            print(f"{each:{width}}  {entry.purpose}")
        return 0
    if name not in benchmarks:
        print(
            f"a benchmark must be one of {', '.join(benchmarks)}, got {name!r}; list them with: "
            "python -m bench --list",
            file=sys.stderr,
        )
        return 2
    sys.argv[1:] = arguments
    runpy.run_module(benchmarks[name].module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
