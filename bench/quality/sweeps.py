"""The selectors that are compared, each as a curve: one setting after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from unisparse_flex import Selector, UniSparse
from unisparse_flex.block_masks.selectors import default_top_p
from unisparse_flex.selectors import (
    DEFAULT_SELECTOR,
    FlashPrefill,
    FlexPrefill,
    MInference,
    Oracle,
    StreamingLLM,
    XAttention,
)

from ..calls import SETTINGS

TOP_P = (0.7, 0.8, 0.9, 0.95, 0.97, 0.99)
THRESHOLDS = (0.032, 0.016, 0.008, 0.004, 0.002)
# Two granularities: single rows against every key, and composites of 16.
TWO = SETTINGS["two"]

DEFAULT_THRESHOLDS = (0.02, 0.014, 0.0095, 0.006, 0.004, 0.002)


def defaults(size: int) -> list[Selector]:
    """The library's default with other thresholds."""
    return [
        replace(
            DEFAULT_SELECTOR,
            block_size=size,
            c_k=min(DEFAULT_SELECTOR.c_k, size),
            threshold=threshold,
            top_p=default_top_p(threshold),
        )
        for threshold in DEFAULT_THRESHOLDS
    ]


SWEEPS: dict[str, Callable[[int], list[Selector]]] = {
    "unisparse-default": defaults,
    "unisparse-paper": lambda size: [UniSparse.paper(block_size=size, top_p=p) for p in TOP_P],
    "unisparse-paper-threshold": lambda size: [
        UniSparse.paper(block_size=size, threshold=t) for t in THRESHOLDS
    ],
    "unisparse-two": lambda size: [UniSparse.paper(block_size=size, top_p=p, **TWO) for p in TOP_P],
    "unisparse-two-threshold": lambda size: [
        UniSparse.paper(block_size=size, threshold=t, **TWO) for t in THRESHOLDS
    ],
    "xattention": lambda size: [XAttention(block_size=size, top_p=p) for p in TOP_P],
    "flexprefill": lambda size: [FlexPrefill(block_size=size, top_p=p) for p in TOP_P],
    "flashprefill": lambda size: [
        FlashPrefill(block_size=size, alpha=a) for a in (0.3, 0.18, 0.1, 0.04, 0.01)
    ],
    "minference": lambda size: [
        MInference(block_size=size, vertical_slash=sizes)
        for sizes in ((100, 400), (300, 1000), (500, 2000), (1000, 4000), (1000, 6096))
    ],
    "streamingllm": lambda size: [
        StreamingLLM(block_size=size, local_tokens=n) for n in (512, 1024, 2048, 4096)
    ],
    "oracle": lambda size: [Oracle(block_size=size, top_p=p) for p in TOP_P],
}
