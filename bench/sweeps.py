"""The selectors that are compared, each as a curve: one setting after the other."""

from __future__ import annotations

from collections.abc import Callable

from unisparse_flex import Selector, UniSparse

TOP_P = (0.7, 0.8, 0.9, 0.95, 0.97, 0.99)
THRESHOLDS = (0.032, 0.016, 0.008, 0.004, 0.002)
# Two granularities: single rows against every key, and composites of 16.
TWO = {"c_q": 16, "c_k": 16, "sampled_queries": 4}

SWEEPS: dict[str, Callable[[int], list[Selector]]] = {
    "unisparse-paper": lambda size: [UniSparse(block_size=size, top_p=p) for p in TOP_P],
    "unisparse-paper-threshold": lambda size: [
        UniSparse(block_size=size, threshold=t) for t in THRESHOLDS
    ],
    "unisparse-two": lambda size: [UniSparse(block_size=size, top_p=p, **TWO) for p in TOP_P],
    "unisparse-two-threshold": lambda size: [
        UniSparse(block_size=size, threshold=t, **TWO) for t in THRESHOLDS
    ],
}
