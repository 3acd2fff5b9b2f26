"""Repeated key heads: found in every spelling, taken out, and left where nothing is proved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.api.models import qkv
from tests.passes.graphs import Calls, capture_export, capture_fx, count_markers
from tests.passes.graphs import run as run_graph
from unisparse_flex import UniSparse
from unisparse_flex.passes import RewriteReport, SparseConfig, rewrite_sdpa

GROUP = 3
HEADS = (6, 2)
LENGTH = 70
ALL = SparseConfig(selector=UniSparse(block_size=16, top_p=1.0))
SHARED = SparseConfig(selector=UniSparse(block_size=16, top_p=1.0, c_h=GROUP))
BYTES = 2 * (HEADS[0] - HEADS[1]) * LENGTH * 16 * 4

Repeat = Callable[[Tensor], Tensor]


def hugging_face(x: Tensor) -> Tensor:
    batch, heads, length, dim = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, GROUP, length, dim)
    return x.reshape(batch, heads * GROUP, length, dim)


def before_transposing(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    batch, length, heads, dim = x.shape
    x = x[:, :, :, None, :].expand(batch, length, heads, GROUP, dim)
    return x.reshape(batch, length, heads * GROUP, dim).transpose(1, 2)


PROVED: dict[str, Repeat] = {
    "hugging face": hugging_face,
    "llama": before_transposing,
    "repeat_interleave": lambda x: x.repeat_interleave(GROUP, dim=1),
    "repeat_interleave from the end": lambda x: torch.repeat_interleave(x, repeats=GROUP, dim=-3),
    "unsqueeze": lambda x: x.unsqueeze(2).expand(-1, -1, GROUP, -1, -1).flatten(1, 2),
    "unsqueeze from the end": lambda x: (
        x.unsqueeze(-3).expand(1, 2, GROUP, LENGTH, 16).flatten(1, 2)
    ),
    "copied": lambda x: hugging_face(x).contiguous(),
    "copied between": lambda x: (
        x[:, :, None].expand(-1, -1, GROUP, -1, -1).contiguous().view(1, HEADS[0], LENGTH, 16)
    ),
    "permuted": lambda x: (
        x.permute(0, 2, 1, 3).repeat_interleave(GROUP, dim=2).permute(0, 2, 1, 3).contiguous()
    ),
}
OTHERS: dict[str, Repeat] = {
    "tiled": lambda x: x.repeat(1, GROUP, 1, 1),
    "tiled by expand": lambda x: x[:, None].expand(-1, GROUP, -1, -1, -1).flatten(1, 2),
    "scaled": lambda x: hugging_face(x) * 1.5,
    "along the tokens": lambda x: hugging_face(x).flip(2),
}


class Repeats:
    """The function of a call whose key and value are repeated."""

    def __init__(self, key: Repeat, value: Repeat | None = None) -> None:
        self.key, self.value = key, key if value is None else value

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, self.key(k), self.value(v), is_causal=True)


def rewritten(
    function: Any, trace: Any = None, config: SparseConfig = ALL
) -> tuple[Any, RewriteReport, Tensor, Tensor]:
    """The rewritten graph, its report, its output and the untouched output."""
    tensors = qkv(LENGTH, heads=HEADS)
    if trace is not None:
        graph = trace(Calls(function), *tensors)
        report = rewrite_sdpa(graph, config)
        return graph, report, run_graph(graph, *tensors), function(*tensors)
    found: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        found.extend((graph, rewrite_sdpa(graph, config)))
        return graph.forward

    torch._dynamo.reset()
    output = torch.compile(function, backend=backend, fullgraph=True)(*tensors)
    return (*found, output, function(*tensors))


def sources(graph: Any) -> list[Any]:
    """Operations that are neither views nor the attention call itself."""
    names = {"repeat_interleave", "expand", "reshape", "flatten", "contiguous", "repeat"}
    return [n for n in graph.graph.nodes if any(name in str(n.target) for name in names)]


@pytest.mark.parametrize("trace", [None, capture_export])
@pytest.mark.parametrize("name", PROVED)
def test_repeated_heads_are_taken_out(name: str, trace: Any) -> None:
    graph, report, output, exact = rewritten(Repeats(PROVED[name]), trace)
    assert list(report.ungrouped.values()) == [BYTES]
    assert "repeated key heads removed" in str(report)
    assert count_markers(graph) == 1
    assert sources(graph) == []
    torch.testing.assert_close(output, exact)


def test_a_group_may_share_its_selection_once_it_is_recovered() -> None:
    _, report, output, exact = rewritten(Repeats(hugging_face), config=SHARED)
    assert len(report.rewritten) == 1
    torch.testing.assert_close(output, exact)


@pytest.mark.parametrize("name", OTHERS)
def test_what_only_looks_like_it_is_left(name: str) -> None:
    _, report, output, exact = rewritten(Repeats(OTHERS[name]))
    assert report.ungrouped == {}
    assert len(report.rewritten) == 1
    torch.testing.assert_close(output, exact)


def test_a_key_repeated_otherwise_than_its_value_is_left() -> None:
    _, report, output, exact = rewritten(Repeats(hugging_face, OTHERS["tiled"]))
    assert report.ungrouped == {}
    torch.testing.assert_close(output, exact)


def test_copies_that_something_else_reads_stay_and_save_nothing() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key = hugging_face(k)
        return F.scaled_dot_product_attention(q, key, hugging_face(v), is_causal=True) + key

    _, report, output, exact = rewritten(function)
    assert list(report.ungrouped.values()) == [BYTES // 2]
    torch.testing.assert_close(output, exact)


@pytest.mark.parametrize("late", [False, True])
def test_keys_that_change_behind_the_copy_are_left(late: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = k.clone()
        if not late:
            cache.mul_(2.0)
        key, value = hugging_face(cache), hugging_face(v)
        if late:
            cache.mul_(2.0)
        return F.scaled_dot_product_attention(q, key, value, is_causal=True)

    _, report, output, exact = rewritten(function)
    assert len(report.ungrouped) == (not late)
    torch.testing.assert_close(output, exact)


def test_calls_of_unknown_shapes_are_left() -> None:
    _, report, output, exact = rewritten(Repeats(PROVED["repeat_interleave"]), capture_fx)
    assert report.ungrouped == {}
    torch.testing.assert_close(output, exact)


@pytest.mark.parametrize("name", ["hugging face", "unsqueeze", "repeat_interleave"])
def test_symbolic_sizes_are_taken_out_too(name: str) -> None:
    found: list[RewriteReport] = []
    function = Repeats(PROVED[name])

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        found.append(rewrite_sdpa(graph, ALL))
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(Calls(function), backend=backend, dynamic=True, fullgraph=True)
    for length in (LENGTH, LENGTH + 33):
        # As many elements as key heads: one symbol stands for both.
        tensors = qkv(length, heads=HEADS, batch=HEADS[1])
        torch.testing.assert_close(run(*tensors), function(*tensors))
    assert [list(report.ungrouped.values()) for report in found] == [[HEADS[1] * BYTES]]
