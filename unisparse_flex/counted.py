"""Numbers of things in words."""

from __future__ import annotations


def counted(count: int, noun: str, verb: str = "") -> str:
    """``"1 thread"``, ``"2 threads"``; with a verb ``"1 layer stays"``, ``"2 layers stay"``.

    Args:
        count: How many.
        noun: What, in the singular.
        verb: What they do, as of several.
    """
    if count == 1:
        return f"1 {noun} {verb}s" if verb else f"1 {noun}"
    return f"{count} {noun}s {verb}".rstrip()
