"""Shares in words, such as the blocks that are kept: 100 % is all of them, 0 % is nothing."""

from __future__ import annotations


def say_share(share: float) -> str:
    """A share in [0, 1] in whole percent, ``"25%"``; in tenths where that is all or none."""
    said = f"{share:.0%}"
    return say_tenths(share) if said in ("0%", "100%") and is_part(share) else said


def say_tenths(share: float) -> str:
    """A share in [0, 1] in percent with one decimal; at the nearest "99.9%" where it is not all."""
    return f"{keep_part(share, decimals=3):.1%}"


def keep_part(share: float, *, decimals: int) -> float:
    """A share that so many decimals do not round to 0 or 1 unless it is that."""
    least = 10.0**-decimals
    return min(max(share, least), 1.0 - least) if is_part(share) else share


def is_part(share: float) -> bool:
    """Whether it is neither nothing nor all."""
    return 0.0 < share < 1.0
