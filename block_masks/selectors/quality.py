"""One dial over the default selector: how much of the attention mass is worth its time."""

from __future__ import annotations

import math
from dataclasses import replace

from .base import Selector
from .unisparse import DEFAULT_SELECTOR, THRESHOLD, UniSparse, default_top_p

# Thresholds, all of them measured (docs/selectors.md).
QUALITIES = {"fast": 0.014, "balanced": THRESHOLD, "high": 0.002}
# Below it a row would be allowed to drop nearly all of its mass.
LEAST_QUALITY = 0.1


def selector_of_quality(quality: str | float, default: UniSparse = DEFAULT_SELECTOR) -> UniSparse:
    """The default selector, keeping more or fewer blocks.

    Args:
        quality: ``"fast"``, ``"balanced"`` (the default) or ``"high"``; or a number of at least
            0.1, by which the default's threshold is divided: 1 is ``"balanced"``, and larger
            ones keep more blocks.
        default: What ``"balanced"`` is.

    Raises:
        TypeError: ``quality`` is neither text nor a number.
        ValueError: It is another word, or a number below 0.1 or not finite.
    """
    names = ", ".join(map(repr, QUALITIES))
    if isinstance(quality, str):
        if quality not in QUALITIES:
            raise ValueError(
                f"quality must be one of {names}, or a number, got {quality!r}; a larger number "
                "keeps more blocks, and 1 is 'balanced'"
            )
        threshold = QUALITIES[quality]
    elif isinstance(quality, bool) or not isinstance(quality, (int, float)):
        raise TypeError(
            f"quality must be one of {names}, or a number, got {type(quality).__name__}; settings "
            "of your own are a selector"
        )
    elif not LEAST_QUALITY <= quality < math.inf:
        raise ValueError(
            f"quality must be a finite number of at least {LEAST_QUALITY}, got {quality}; 1 is "
            "'balanced', a larger one keeps more blocks"
        )
    else:
        # Four digits: the text of the settings stays readable.
        threshold = float(f"{THRESHOLD / quality:.4g}")
    return replace(default, threshold=threshold, top_p=default_top_p(threshold))


def choose_selector(
    selector: Selector | None, quality: str | float | None, default: UniSparse = DEFAULT_SELECTOR
) -> Selector:
    """The selector that two arguments ask for of which one at most is given.

    Raises:
        TypeError: As `selector_of_quality`.
        ValueError: As `selector_of_quality`, or both are given.
    """
    if quality is None:
        return default if selector is None else selector
    if selector is not None:
        raise ValueError(
            f"selector and quality must not both be given, got {selector!r} and {quality!r}; a "
            "quality is a setting of the default selector"
        )
    return selector_of_quality(quality, default)
