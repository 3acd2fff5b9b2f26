"""Every selector in small, and what a selector by scores keeps, row by row in float64.

Symbols: B batch, Hq/Hkv heads, Nq/Nk blocks, S tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from unisparse_flex.block_masks import Selector, UniSparse
from unisparse_flex.block_masks.selectors import FlashPrefill, Oracle, StreamingLLM, XAttention

from . import oracle
from .strategies import Call

SIZE = 16
LENGTHS = (1, 15, 16, 17, 31, 32, 33, 48, 50)
FORCED: dict[str, Any] = {"sink_blocks": 0, "local_blocks": 1, "last_query_blocks": 0}
# Each keeps what holds half of the attention, and little else.
BY_SCORES: tuple[Selector, ...] = (
    UniSparse(block_size=SIZE, c_q=4, c_k=4, sampled_queries=0, top_p=0.5, **FORCED),
    XAttention(block_size=SIZE, stride=4, top_p=0.5, **FORCED),
    FlashPrefill(block_size=SIZE, alpha=0.6, **FORCED),
    Oracle(block_size=SIZE, top_p=0.5, **FORCED),
)
STATIC: tuple[Selector, ...] = (
    StreamingLLM(block_size=SIZE, sink_tokens=4, local_tokens=18, last_query_tokens=3),
)
SELECTORS = BY_SCORES + STATIC

HeadScores = Callable[[Tensor, Tensor, Call], Tensor]
Choose = Callable[[Sequence[float], Sequence[bool], Sequence[bool]], tuple[list[bool], float]]


def name(selector: Selector) -> str:
    """A selector's class, for the name of a test."""
    return type(selector).__name__


def calls_of(selector: Selector) -> list[Call]:
    """Calls around block edges, causal at every residue of the offset, and not causal."""
    shapes = [(True, length, length) for length in LENGTHS]
    shapes += [(True, q_len, q_len + 16 + r) for r in range(SIZE) for q_len in (1, 17, 33)]
    shapes += [(False, length, length) for length in LENGTHS]
    if not isinstance(selector, StreamingLLM):
        shapes += [(False, 33, kv_len) for kv_len in LENGTHS]
        shapes += [(False, q_len, 50) for q_len in LENGTHS]
    return [
        Call(
            batch=2,
            kv_heads=2,
            group=2,
            q_len=q_len,
            kv_len=kv_len,
            causal=causal,
            selector=selector,
            seed=100 * q_len + kv_len,
        )
        for causal, q_len, kv_len in shapes
    ]


def assert_keeps_what_is_defined(call: Call, head_scores: HeadScores, choose: Choose) -> None:
    """Compares a selection with its definition; rows on the brink of a rule may go either way.

    Args:
        call: The call.
        head_scores: Scores [Nq, Nk] of one head, from query [Sq, D] and key [Skv, D].
        choose: The rule: a row's kept blocks, and how far it is from keeping others.
    """
    query, key = call.query_key()
    keep = call.keep()
    pairs = oracle.visible_pairs(call.q_len, call.kv_len, call.offset)
    visible = oracle.any_in_block(pairs, call.selector.block_size).tolist()
    forced = oracle.forced_blocks(call).tolist()
    for b in range(call.batch):
        for head in range(call.q_heads):
            scores = head_scores(query[b, head], key[b, head // call.group], call).tolist()
            for i, row in enumerate(scores):
                expected, margin = choose(row, forced[i], visible[i])
                if margin > 1e-9:
                    assert keep[b, head, i].tolist() == expected


def rows_seen(call: Call, row: int) -> int:
    """How many keys a row sees, from the first on."""
    return call.kv_len if call.offset is None else row + call.offset + 1
