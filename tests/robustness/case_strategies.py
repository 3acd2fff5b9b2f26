"""Random `Case`s. Most are right calls of plain numbers; each corner comes up on its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st

from unisparse_flex import Selector, UniSparse
from unisparse_flex.selectors import (
    DenseSpan,
    FlashPrefill,
    FlexPrefill,
    MInference,
    Oracle,
    StreamingLLM,
    XAttention,
)

from .cases import CONTENTS, LAYOUTS, MASKS, SHARING, SPECIAL_MASKS, Case, Mask
from .faults import FAULTS

SIZE = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FEW: dict[str, Any] = {"sink_blocks": 0, "local_blocks": 1, "last_query_blocks": 0}
SELECTORS: tuple[Selector, ...] = (
    UniSparse(block_size=SIZE, c_q=4, c_k=4, top_k=1, **FEW),
    UniSparse(block_size=SIZE, c_q=4, c_k=4, top_p=0.5, **FEW),
    UniSparse(block_size=SIZE, c_q=16, c_k=1, top_p=0.3, sampled_queries=2, **FEW),
    UniSparse(block_size=SIZE, c_q=1, c_k=16, threshold=0.4, top_p=0.2),
    UniSparse(block_size=SIZE, threshold=0.6, sampled_queries=16, **FEW),
    UniSparse(block_size=SIZE, top_p=1.0),
    UniSparse(block_size=32, c_q=8, c_k=2, top_k=2),
    UniSparse(),
    XAttention(block_size=SIZE, stride=4, top_p=0.5, **FEW),
    FlashPrefill(block_size=SIZE, alpha=0.6, **FEW),
    FlexPrefill(block_size=SIZE, top_p=0.5, min_budget=16),
    MInference(block_size=SIZE, vertical_slash=(3, 2), last_q=8, sink_tokens=1),
    Oracle(block_size=SIZE, top_p=0.5),
    StreamingLLM(block_size=SIZE, sink_tokens=4, local_tokens=18, last_query_tokens=3),
    DenseSpan(selector=UniSparse(block_size=SIZE, top_k=1, **FEW), tokens="3:20"),
)
SCALES = (None, 0.0, 1.0, -0.5, 1, 1e-30, 1e4, 1e30, -1e4, math.inf, math.nan)


def _often(common: Any, *rare: Any, times: int = 6) -> st.SearchStrategy[Any]:
    return st.sampled_from([common] * times + list(rare))


def lengths() -> st.SearchStrategy[int]:
    """One token to two blocks and one, those around the edges of blocks more often."""
    return st.sampled_from([1, 15, 16, 17, 31, 32, 33]) | st.integers(1, 2 * SIZE + 1)


def masks() -> st.SearchStrategy[Mask]:
    @st.composite
    def mask(draw: st.DrawFn) -> Mask:
        whole = draw(st.tuples(*[st.booleans()] * 4))
        least = 4 - whole.index(True) if True in whole else 0
        return Mask(
            kind=draw(st.sampled_from(MASKS * 2 + SPECIAL_MASKS)),
            whole=whole,
            dims=draw(st.integers(least, 4)),
            dtype=draw(st.sampled_from(DTYPES)),
        )

    return mask()


@st.composite
def cases(draw: st.DrawFn, *, faults: bool = True) -> Case:
    """Any call; one in six has a fault."""
    kv_len = draw(lengths())
    content = _often("normal", *CONTENTS, times=12)
    layout = _often("contiguous", *LAYOUTS, times=8)
    masked = draw(_often(False, True, times=2))
    causal = "no" if masked else draw(st.sampled_from(["no", "upper left", "lower right"]))
    return Case(
        batch=draw(_often(1, 2, 0, times=3)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(_often(1, 2, 3, times=2)),
        q_len=draw(st.just(kv_len) | lengths()),
        kv_len=kv_len,
        head_dim=draw(_often(4, 1, 3, 8, 16, times=3)),
        value_dim=draw(_often(4, 1, 5, 16, 0, times=4)),
        dtype=draw(st.sampled_from(DTYPES)),
        contents=(draw(content), draw(content), draw(content)),
        layouts=(draw(layout), draw(layout), draw(layout)),
        sharing=draw(_often("none", *SHARING)),
        mask=draw(masks()) if masked else None,
        is_causal=causal == "upper left",
        causal_lower_right=causal == "lower right",
        scale=draw(_often(None, *SCALES, times=10)),
        selector=draw(st.sampled_from(SELECTORS)),
        fault=draw(_often(None, *FAULTS, times=5 * len(FAULTS))) if faults else None,
        seed=draw(st.integers(0, 2**20)),
    )
