"""Starts the command ``unisparse-flex`` without waiting for torch.

Python runs ``unisparse_flex/__init__.py``, which imports torch, before any module inside. Here the
package is put in place without being run; `unisparse_flex.cli.library` runs it once the arguments
have been found right.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec

PACKAGE = "unisparse_flex"


def main() -> int:
    """Runs the command with the arguments of the process and returns its exit code."""
    if PACKAGE not in sys.modules:
        spec = find_spec(PACKAGE)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {PACKAGE!r}", name=PACKAGE)
        sys.modules[PACKAGE] = module_from_spec(spec)
    from unisparse_flex.cli import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
