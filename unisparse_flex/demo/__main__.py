"""``python -m unisparse_flex.demo``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
