"""Lists the benchmarks, or runs one.

python -m bench [--list]
python -m bench NAME [ARGUMENTS]      # the same as python -m bench.NAME
"""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def find_benchmarks() -> dict[str, str]:
    """What can be run, and what each says of itself in its first line."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a benchmark; 2 where there is none of that name."""
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--list"]
    benchmarks = find_benchmarks()
    if name in ("--list", "--help", "-h"):
        width = max(map(len, benchmarks))
        for each, purpose in benchmarks.items():
            print(f"{each:{width}}  {purpose}")
        return 0
    if name not in benchmarks:
        print(
            f"a benchmark must be one of {', '.join(benchmarks)}, got {name!r}; list them with: "
            "python -m bench --list",
            file=sys.stderr,
        )
        return 2
    sys.argv[1:] = arguments
    runpy.run_module(f"bench.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
