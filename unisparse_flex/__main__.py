"""``python -m unisparse_flex``: the command ``unisparse-flex``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
