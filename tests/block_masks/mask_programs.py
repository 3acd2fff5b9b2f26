"""Random masks as formulas, and what they say pair by pair.

Symbols: B batch, Sq/Skv tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.block_masks.masks import MaskProgram

LENGTHS = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 127, 129])
# What a formula may read: documents, padding of keys and queries, prefixes.
TENSORS = ("t0[b, kv]", "t0[b, q]", "t1[b, kv]", "t1[0, q]", "t2[b]")

Oracle = Callable[[dict[str, Any]], bool]


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A formula, its tensors, and the same as Python code that nothing here reads."""

    text: str
    batch: int
    q_len: int
    kv_len: int
    seed: int
    numbers: tuple[int, ...]

    def tensors(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        length = max(self.q_len, self.kv_len)
        documents = torch.rand(self.batch, length, generator=generator).lt(0.05).cumsum(-1)
        valid = torch.rand(self.batch, length, generator=generator) < 0.8
        valid[:, : length // 3] &= torch.rand(self.batch, 1, generator=generator) < 0.5
        prefix = torch.randint(0, length, (self.batch,), generator=generator)
        return [documents, valid, prefix]

    def program(self) -> MaskProgram:
        return MaskProgram.parse(
            self.text,
            tensors=self.tensors(),
            numbers=self.numbers,
            batch=self.batch,
            q_len=self.q_len,
            kv_len=self.kv_len,
        )

    def pairs(self) -> Tensor:
        """bool [B, Sq, Skv], each entry by Python's own arithmetic."""
        t0, t1, t2 = (_Rows(tensor.tolist()) for tensor in self.tensors())
        code = compile(_as_python(self.text), "mask", "eval")
        names: dict[str, Any] = {f"n{i}": n for i, n in enumerate(self.numbers)}
        names |= {"t0": t0, "t1": t1, "t2": t2}
        result = torch.zeros(self.batch, self.q_len, self.kv_len, dtype=torch.bool)
        for b in range(self.batch):
            for q in range(self.q_len):
                for kv in range(self.kv_len):
                    result[b, q, kv] = bool(eval(code, names | {"b": b, "q": q, "kv": kv}))
        return result

    def everywhere(self) -> Tensor:
        """The program's own bool [B, 1, Sq, Skv]."""
        pairs = self.program().pairs(torch.arange(self.q_len), torch.arange(self.kv_len))
        return pairs.expand(self.batch, -1, -1, -1)


class _Rows:
    """Nested lists read as ``rows[b, kv]``."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __getitem__(self, index: Any) -> Any:
        entry: Any = self.rows
        for at in index if isinstance(index, tuple) else (index,):
            entry = entry[at]
        return entry


def _as_python(text: str) -> str:
    # On Python's bools, ~ is arithmetic: negation is spelled out.
    return text.replace("~", "True ^ ")


def integers() -> st.SearchStrategy[str]:
    """Sides of comparisons."""
    constant = st.integers(-70, 70).map(str)
    plain = st.sampled_from(["q", "kv", "q + n0", "kv + n1", "t2[b]", "t0[b, q]", "t0[b, kv]"])
    scaled = st.builds(
        "{} * {} + {}".format, st.integers(2, 3), st.sampled_from(["q", "kv"]), constant
    )
    chunk = st.builds(
        "({} + {}) // {}".format, st.sampled_from(["q", "kv"]), constant, st.integers(1, 20)
    )
    return constant | plain | scaled | chunk | st.builds("{} + {}".format, plain, constant)


@st.composite
def comparisons(draw: st.DrawFn) -> str:
    usual = st.sampled_from(
        [
            "kv <= q",
            "kv <= q + n0",
            "q < kv + 40",
            "kv < q",
            "t0[b, q] == t0[b, kv]",
            "kv < t2[b]",
            "q // 16 == kv // 16",
            "t1[b, kv]",
            "t1[0, q]",
            "~t1[b, kv]",
        ]
    )
    free = st.builds("{} {} {}".format, integers(), st.sampled_from(["<", "<=", "=="]), integers())
    return draw(usual | free)


def formulas() -> st.SearchStrategy[str]:
    """Any formula of up to a few parts, usual ones more often."""
    return st.recursive(
        comparisons(),
        lambda inner: (
            st.builds("({}) & ({})".format, inner, inner)
            | st.builds("({}) | ({})".format, inner, inner)
            | inner.map("~({})".format)
        ),
        max_leaves=4,
    )


@st.composite
def masks(draw: st.DrawFn, *, square: bool = False) -> Mask:
    q_len = draw(LENGTHS)
    return Mask(
        text=draw(formulas()),
        batch=draw(st.integers(1, 2)),
        q_len=q_len,
        kv_len=q_len if square else draw(LENGTHS),
        seed=draw(st.integers(0, 1000)),
        numbers=(draw(st.integers(-5, 70)), draw(st.integers(0, 9))),
    )
