"""Compiled calls whose masks the kernels read, at lengths that are known and at dynamic ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unisparse_flex import UniSparse, optimize
from unisparse_flex.block_masks.kernels import operator
from unisparse_flex.block_masks.key_intervals import IntervalTables, interval_tables
from unisparse_flex.passes.rewrite.graph import PreparedMasks

from .interpreter import Kernels

SIZES: dict[str, Any] = {"block_size": 16, "c_q": 4, "c_k": 4, "sampled_queries": 2}
RULES: dict[str, dict[str, Any]] = {
    "blocks of a row": {"top_k": 3},
    "a threshold for each head": {"head_thresholds": (0.05, 0.3)},
}
HEADS, HEAD_DIM = 2, 16


@dataclass
class Runs:
    """How often the operators of the kernels ran."""

    tables: int = 0
    selections: int = 0


@pytest.fixture
def runs(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """The operators as on a GPU that has the kernels, which are interpreted."""
    found = Runs()

    def make_tables(*args: Any, **kwargs: Any) -> IntervalTables:
        found.tables += 1
        return interval_tables(*args, **kwargs)

    def select(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        found.selections += 1
        return operator._run(*args, **kwargs)

    monkeypatch.setattr(operator, "keys_obstacle", lambda _: None)
    monkeypatch.setattr(operator, "interval_tables", make_tables)
    monkeypatch.setattr(PreparedMasks, "DEVICE", "cpu")
    monkeypatch.setitem(sys.modules, f"{operator.__package__}.lists", kernels.lists)
    library = torch.library.Library("unisparse", "IMPL")
    library.impl("select_blocks", select, "CPU")
    yield found
    library._destroy()


class TwoLayers(torch.nn.Module):
    """Two attention calls that share a mask, which the model makes of ids."""

    def __init__(self, mask: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.mask = mask
        width = HEADS * HEAD_DIM
        self.project = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width) for _ in range(2))

    def forward(self, tokens: Tensor, ids: Tensor) -> Tensor:
        mask = self.mask(ids, tokens.shape[1])
        for project in self.project:
            heads = project(tokens).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
            query, key, value = heads.unbind()
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            tokens = tokens + attended.transpose(1, 2).flatten(2)
        return tokens


def causal(length: int) -> Tensor:
    position = torch.arange(length)
    return position[None, :] <= position[:, None]


def chunks(length: int) -> Tensor:
    chunk = torch.arange(length) // 40
    return chunk[None, :] == chunk[:, None]


MASKS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "padding on the left": lambda ids, length: (
        causal(length) & (ids > 0)[:, None, None, :] & (ids > 0)[:, None, :, None]
    ),
    "documents in chunks": lambda ids, length: (
        causal(length) & chunks(length) & (ids[:, :, None] == ids[:, None])[:, None]
    ),
}


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randn((batch, length, HEADS * HEAD_DIM), generator=generator)
    starts = torch.rand((batch, length), generator=generator) < 0.03
    return tokens, starts.cumsum(-1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", MASKS)
def test_compiled_calls_attend_to_what_plain_pytorch_selects(
    runs: Runs, kind: str, rule: str
) -> None:
    selector = UniSparse(**SIZES, **RULES[rule])
    model = TwoLayers(MASKS[kind]).requires_grad_(False)
    optimized = optimize(TwoLayers(MASKS[kind]).requires_grad_(False), selector, min_length=0)
    optimized.load_state_dict(model.state_dict())
    compilations = 0

    def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        nonlocal compilations
        compilations += 1
        return torch._inductor.compile(graph, examples)

    compiled = torch.compile(optimized, backend=backend, dynamic=True)
    for batch, length in ((2, 70), (3, 101)):
        given = inputs(batch, length)
        before = runs.tables, runs.selections
        found = compiled(*given)
        assert (runs.tables - before[0], runs.selections - before[1]) == (1, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operator, "keys_obstacle", lambda _: "plain")
            expected = optimized(*given)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert compilations == 1


def test_a_traced_selection_has_the_thresholds_of_its_heads(runs: Runs) -> None:
    selector = UniSparse(**SIZES, head_thresholds=(0.07, 0.2))

    def keep(query: Tensor, key: Tensor) -> Tensor:
        return selector.select(query, key, is_causal=True).keep

    compiled = torch.compile(keep, fullgraph=True, dynamic=False, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    for length in (70, 101):
        query, key = 2 * torch.randn(2, 1, HEADS, length, HEAD_DIM, generator=generator)
        found = compiled(query, key)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operator, "keys_obstacle", lambda _: "plain")
            assert found.equal(keep(query, key))
    assert runs.selections == 2
