"""Which rows of a batch run sparse; plain numbers, without vLLM."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .reasons import Reason

# Rows like this one that a prompt may have had, for what was cut to be taken for its end.
MOST_CUTS = 16

# Why a row of so many queries and keys stays with the parent; ``None`` where it runs sparse.
Decide = Callable[[int, int], Reason | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A request's tokens in a batch.

    Attributes:
        index: Its place among the batch's requests.
        start: Its first token in the batch.
        stop: The token after its last.
        length: Its keys, those of this step included.
        is_cut: Whether the scheduler cut the prompt here, so that more of its rows will follow.
    """

    index: int
    start: int
    stop: int
    length: int
    is_cut: bool = False

    @property
    def queries(self) -> int:
        """Its tokens in the batch."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A batch, split.

    Attributes:
        sparse: Rows that run sparse.
        rest: All others.
        decode: Rows of one token whose pages are chosen.
        ends: Of the rows of prompts, however they run, those of several tokens that may be the last
            of their prompts; of very many of one prompt, those that were not cut.
        reasons: How many rows stay with the parent, and why.
    """

    sparse: tuple[Row, ...]
    rest: tuple[Row, ...]
    decode: tuple[Row, ...] = ()
    ends: tuple[Row, ...] = ()
    reasons: Counter[Reason] = field(default_factory=Counter)


def refuse_batch(common: Any, prefix: int) -> Reason | None:
    """Why no row of a batch runs sparse; ``None`` where some may.

    Args:
        common: vLLM's ``CommonAttentionMetadata``.
        prefix: Keys at their beginning that all requests share, computed once for all of them.
    """
    if prefix > 0:
        return Reason.CASCADE
    if common.causal is not True:
        return Reason.NOT_CAUSAL
    if common.mm_req_doc_ranges is not None or common.rswa_prefix_lens is not None:
        return Reason.PREFIX_IMAGES
    if common.seq_lens_cpu_upper_bound is None:
        return Reason.SPLIT_BATCH
    return None


def plan_rows(
    starts: Sequence[int],
    lengths: Sequence[int],
    prefilling: Sequence[bool] | None,
    *,
    min_queries: int,
    decide: Decide,
    budget: int,
    threshold: int = 0,
    decode_keys: int | None = None,
) -> Plan:
    """Splits a batch into sparse prefill rows, rows that decode sparse, and all others.

    Args:
        starts: First token of every row, and the number of tokens.
        lengths: Keys of every row, those of this step included.
        prefilling: Whether a row is one of a prompt; all by default.
        min_queries: Fewest queries of a sparse row.
        decide: Asked for rows of so many queries.
        budget: Most tokens that the scheduler puts into a batch.
        threshold: Most tokens of one prompt in a batch; 0 for no limit.
        decode_keys: Fewest keys of all rows of one token for which these decode sparse; ``None``
            for never.
    """
    is_prompt = [True] * len(lengths) if prefilling is None else prefilling
    chunks = sum(
        stop - start >= min_queries and prompt
        for start, stop, prompt in zip(starts, starts[1:], is_prompt, strict=False)
    )
    # The scheduler fills a batch with what it can of the last prompt. Of several prompts it is
    # not known which was cut: none is taken to be.
    fills_batch = starts[len(lengths)] >= budget and chunks == 1
    single = [n for n, (a, b) in zip(lengths, pairwise(starts), strict=False) if b - a == 1]
    decodes = decode_keys is not None and sum(single) >= max(decode_keys, 1)
    sparse: list[Row] = []
    rest: list[Row] = []
    decode: list[Row] = []
    ends: list[Row] = []
    reasons: Counter[Reason] = Counter()
    for index, length in enumerate(lengths):
        start, stop = starts[index], starts[index + 1]
        queries = stop - start
        row = Row(
            index=index,
            start=start,
            stop=stop,
            length=length,
            is_cut=fills_batch or 0 < threshold == queries,
        )
        if queries == 0:
            continue
        if queries == 1 and decodes:
            decode.append(row)
            continue
        # A prompt may end with a batch that it fills.
        if queries > 1 and is_prompt[index] and (not row.is_cut or length <= MOST_CUTS * queries):
            ends.append(row)
        if queries < min_queries:
            reason: Reason | None = Reason.DECODE
        elif not is_prompt[index]:
            reason = Reason.VERIFICATION
        else:
            reason = decide(queries, length)
        if reason is None:
            sparse.append(row)
        else:
            rest.append(row)
            reasons[reason] += 1
    return Plan(
        sparse=tuple(sparse),
        rest=tuple(rest),
        decode=tuple(decode),
        ends=tuple(ends),
        reasons=reasons,
    )
