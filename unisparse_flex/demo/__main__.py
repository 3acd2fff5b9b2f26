"""``python -m unisparse_flex.demo``: the command ``unisparse-flex demo``."""

import sys

from ..cli import main

if __name__ == "__main__":
    raise SystemExit(main(["demo", *sys.argv[1:]]))
