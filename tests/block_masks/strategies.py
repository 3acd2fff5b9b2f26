"""Random attention calls as plain values, so that a falsifying example can be pasted back.

Symbols: B batch, Hq/Hkv heads, G = Hq/Hkv, Sq/Skv tokens, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.block_masks import BlockGeometry, BlockSelection, UniSparse

HEAD_DIM = 4
MAX_BLOCKS = {16: 6, 32: 4, 64: 3}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One attention call; its tensors follow from the seed."""

    batch: int
    kv_heads: int
    group: int
    q_len: int
    kv_len: int
    causal: bool
    selector: Any
    seed: int

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def offset(self) -> int | None:
        return self.kv_len - self.q_len if self.causal else None

    @property
    def geometry(self) -> BlockGeometry:
        return BlockGeometry(
            q_len=self.q_len,
            kv_len=self.kv_len,
            block_size=self.selector.block_size,
            causal_offset=self.offset,
        )

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def with_selector(self, **changes: Any) -> Call:
        return replace(self, selector=replace(self.selector, **changes))

    def with_rule(self, *, top_p: float | None = None, top_k: int | None = None) -> Call:
        return self.with_selector(top_p=top_p, top_k=top_k)

    def query_key(self) -> tuple[Tensor, Tensor]:
        """Query [B, Hq, Sq, D] and key [B, Hkv, Skv, D] whose pooled logits vary."""
        generator = self.generator()
        return (
            _tokens(generator, self.batch, self.q_heads, self.q_len),
            _tokens(generator, self.batch, self.kv_heads, self.kv_len),
        )

    def select(
        self, query: Tensor | None = None, key: Tensor | None = None, **options: Any
    ) -> BlockSelection:
        """The library's selection, for other tensors where they are given."""
        own_query, own_key = self.query_key()
        return self.selector.select(
            own_query if query is None else query,
            own_key if key is None else key,
            causal_lower_right=self.causal,
            **options,
        )

    def keep(self, query: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        """The kept blocks of every query head: bool [B, Hq, Nq, Nk]."""
        return self.select(query, key).keep.expand(-1, self.q_heads, -1, -1)


def _tokens(generator: torch.Generator, batch: int, heads: int, length: int) -> Tensor:
    def noise(count: int) -> Tensor:
        shape = (batch, heads, count, HEAD_DIM)
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    # A walk in steps of 8 tokens survives pooling, white noise alone would not.
    drift = noise((length + 7) // 8).repeat_interleave(8, dim=2)[:, :, :length]
    return noise(length) + 1.5 * drift


def lengths(block_size: int, max_blocks: int | None = None) -> st.SearchStrategy[int]:
    """Token counts on, just before and just behind block edges, and anywhere between."""
    most = MAX_BLOCKS[block_size] if max_blocks is None else max_blocks
    edges = [n * block_size + step for n in range(most + 1) for step in (-1, 0, 1)]
    anywhere = range(1, most * block_size + 2)
    return st.sampled_from([edge for edge in edges if edge > 0]) | st.sampled_from(anywhere)


def offsets(block_size: int) -> st.SearchStrategy[int]:
    """Causal offsets of up to two blocks, those next to a block edge more often."""
    edges = [n * block_size + step for n in range(3) for step in (-2, -1, 0, 1)]
    return st.sampled_from([edge for edge in edges if edge >= 0]) | st.sampled_from(
        range(2 * block_size + 1)
    )


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def selectors(
    draw: st.DrawFn, *, group: int = 1, rules: tuple[str, ...] = ("top_p", "top_k")
) -> UniSparse:
    block_size = draw(st.sampled_from([16, 16, 32, 64]))
    rule = draw(st.sampled_from(rules))
    top_p = st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0]) | st.floats(0.05, 0.99)
    return UniSparse(
        block_size=block_size,
        c_q=draw(st.sampled_from(divisors(block_size))),
        c_k=draw(st.sampled_from(divisors(block_size))),
        c_h=draw(st.sampled_from(divisors(group))),
        top_p=draw(top_p) if rule == "top_p" else None,
        top_k=draw(st.integers(1, 5)) if rule == "top_k" else None,
        # Rows that are sampled have tests of their own.
        sampled_queries=0,
        sink_blocks=draw(st.integers(0, 2)),
        local_blocks=draw(st.integers(1, 2)),
        last_query_blocks=draw(st.integers(0, 2)),
    )


@st.composite
def calls(
    draw: st.DrawFn,
    *,
    causal: bool | None = None,
    square: bool = False,
    rules: tuple[str, ...] = ("top_p", "top_k"),
) -> Call:
    """Any call a selector accepts; ``square`` for as many queries as keys."""
    group = draw(st.integers(1, 4))
    selector = draw(selectors(group=group, rules=rules))
    causal = draw(st.booleans()) if causal is None else causal
    q_len = draw(lengths(selector.block_size))
    if square:
        kv_len = q_len
    elif causal:
        kv_len = q_len + draw(offsets(selector.block_size))
    else:
        kv_len = draw(lengths(selector.block_size))
    return Call(
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 2)),
        group=group,
        q_len=q_len,
        kv_len=kv_len,
        causal=causal,
        selector=selector,
        seed=draw(st.integers(0, 2**31)),
    )


@st.composite
def random_masks(draw: st.DrawFn, call: Call) -> Tensor:
    """Bool masks of any broadcastable shape; some rows see nothing, some blocks are empty."""
    batch, heads = draw(st.sampled_from([1, call.batch])), draw(st.sampled_from([1, call.q_heads]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.02, 0.3, 0.9]))

    def flips(*shape: int, share: float) -> Tensor:
        return torch.rand(shape, generator=generator) < share

    mask = flips(batch, heads, call.q_len, call.kv_len, share=density)
    mask &= flips(batch, heads, call.q_len, 1, share=0.9)
    size = call.selector.block_size
    blocks = flips(batch, heads, -(-call.q_len // size), -(-call.kv_len // size), share=0.7)
    spread = blocks.repeat_interleave(size, 2).repeat_interleave(size, 3)
    return mask & spread[:, :, : call.q_len, : call.kv_len]
