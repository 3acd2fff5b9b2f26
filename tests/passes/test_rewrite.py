"""`rewrite_sdpa` on what Dynamo, symbolic tracing and export produce."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.api.models import FINE, qkv
from tests.api.reference import attend, rmse
from unisparse_flex import UniSparse, optimize
from unisparse_flex.passes import DenseReason, RewriteReport, SparseConfig, rewrite_sdpa
from unisparse_flex.passes.attend.marker import lowered_sdpa
from unisparse_flex.passes.calls import SdpaCall, is_sdpa

from .graphs import MARKERS, SPELLINGS, TRACERS, Calls, Stripes, count_markers, run, targets

CONFIG = SparseConfig(selector=FINE)
LONG = SparseConfig(selector=FINE, min_length=10_000)
LENGTH = 150


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def twice(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    inner = causal(query, key, value)
    return causal(query + inner, key, value) + inner.mean()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return qkv(LENGTH, heads=(4, 4))


@pytest.fixture(params=list(TRACERS))
def trace(request: pytest.FixtureRequest) -> Callable[[Callable[..., Any]], Any]:
    return lambda function: TRACERS[request.param](Calls(function), *inputs())


@pytest.mark.parametrize("spelling", list(SPELLINGS))
def test_every_spelling_is_rewritten_and_keeps_its_meaning(trace: Any, spelling: str) -> None:
    graph = trace(SPELLINGS[spelling])
    report = rewrite_sdpa(graph, CONFIG)
    assert (len(report.rewritten), report.left) == (1, {})
    assert count_markers(graph) == 1
    tensors = inputs()
    output = run(graph, *tensors)
    exact = attend(*tensors, selector=FINE, offset=0)
    floor = rmse(attend(*tensors, selector=FINE, offset=0, dtype=torch.float32), exact)
    assert rmse(output, exact) <= 3 * floor
    assert rmse(output, attend(*tensors, offset=0)) > 1e-2


def test_scale_and_grouped_heads_survive() -> None:
    tensors = qkv(LENGTH)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=0.5, enable_gqa=True)

    graph = fx.symbolic_trace(Calls(call))
    rewrite_sdpa(graph, CONFIG)
    assert rmse(run(graph, *tensors), attend(*tensors, selector=FINE, scale=0.5)) < 1e-6


def test_nothing_is_rewritten_without_settings(trace: Any) -> None:
    graph = trace(causal)
    report = rewrite_sdpa(graph, None)
    assert (report.rewritten, report.left, count_markers(graph)) == ([], {}, 0)


def test_a_graph_without_attention_is_untouched(trace: Any) -> None:
    graph = trace(lambda q, k, v: F.softmax(q @ k.transpose(-1, -2), -1) @ v)
    before = str(graph.graph)
    report = rewrite_sdpa(graph, CONFIG)
    assert (report.rewritten, report.left) == ([], {})
    assert str(graph.graph) == before


@pytest.mark.parametrize("name", ["dynamo", "export"])
def test_a_call_with_recorded_lengths_stays_as_it_is_where_it_is_short(name: str) -> None:
    graph = TRACERS[name](Calls(causal), *inputs())
    before = str(graph.graph)
    report = rewrite_sdpa(graph, LONG)
    assert list(report.left.values()) == [DenseReason.SHORT]
    assert str(graph.graph) == before


def test_a_call_of_unknown_lengths_decides_when_it_runs() -> None:
    graph = fx.symbolic_trace(Calls(causal))
    report = rewrite_sdpa(graph, SparseConfig(selector=FINE, min_length=LENGTH))
    assert len(report.rewritten) == 1
    short = qkv(LENGTH - 1, heads=(4, 4))
    assert run(graph, *short).equal(causal(*short))
    assert rmse(run(graph, *inputs()), causal(*inputs())) > 1e-2


def test_a_call_with_several_users_reaches_all_of_them(trace: Any) -> None:
    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = causal(query, key, value)
        return torch.cat([out, out * 2, out.exp() + query], dim=-1)

    graph = trace(call)
    assert len(rewrite_sdpa(graph, CONFIG).rewritten) == 1
    tensors = inputs()
    out = attend(*tensors, selector=FINE, offset=0)
    expected = torch.cat([out, out * 2, out.exp() + tensors[0]], dim=-1)
    assert rmse(run(graph, *tensors), expected) < 1e-6


def test_calls_in_a_row_are_all_rewritten(trace: Any) -> None:
    graph = trace(twice)
    assert len(rewrite_sdpa(graph, CONFIG).rewritten) == 2
    query, key, value = (t.double() for t in inputs())
    inner = attend(query, key, value, selector=FINE, offset=0)
    expected = attend(query + inner, key, value, selector=FINE, offset=0) + inner.mean()
    assert rmse(run(graph, *inputs()), expected) < 1e-6


def test_calls_in_the_graph_of_a_submodule_are_rewritten() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fx.symbolic_trace(Calls(causal))

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return causal(self.inner(query, key, value), key, value)

    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, fx.GraphModule)

    outer = Outer()
    graph = fx.GraphModule(outer, Leaves().trace(outer))
    assert len(rewrite_sdpa(graph, CONFIG).rewritten) == 2
    assert count_markers(graph.inner) == 1


@pytest.mark.parametrize("wrong", [None, "graph", Calls(causal), causal])
def test_what_is_no_graph_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"graph must be an fx\.Graph.*got"):
        rewrite_sdpa(wrong, CONFIG)


def test_lowering_puts_the_computation_in_place_of_the_marker() -> None:
    graph = TRACERS["dynamo"](optimize(Calls(causal), FINE, min_length=0), *inputs())
    assert count_markers(graph) == 1
    report = rewrite_sdpa(graph, None, lower=True)
    assert len(report.rewritten) == 1
    assert targets(graph) == [lowered_sdpa]


def test_a_marker_keeps_settings_of_its_own() -> None:
    graph = fx.symbolic_trace(optimize(Calls(causal), FINE, min_length=0))
    rewrite_sdpa(graph, SparseConfig(selector=UniSparse(block_size=64)))
    (marker,) = (node for node in graph.graph.nodes if node.target in MARKERS)
    assert SparseConfig.decode(marker.kwargs["config"]).selector == FINE


def test_metadata_of_a_call_is_carried_over() -> None:
    graph = TRACERS["dynamo"](Calls(causal), *inputs())
    (before,) = (dict(node.meta) for node in graph.graph.nodes if node.op == "call_function")
    rewrite_sdpa(graph, CONFIG)
    (after,) = (dict(node.meta) for node in graph.graph.nodes if node.op == "call_function")
    assert before.keys() <= after.keys()
    assert after["example_value"].shape == inputs()[0].shape


def test_a_rewritten_exported_program_is_saved_and_loaded() -> None:
    program = TRACERS["export"](Calls(causal), *inputs())
    rewrite_sdpa(program, SparseConfig(selector=Stripes()))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    assert count_markers(loaded) == 1
    exact = attend(*inputs(), selector=Stripes(), offset=0)
    assert rmse(run(loaded, *inputs()), exact) < 1e-6


def test_a_report_counts_what_it_names() -> None:
    report = RewriteReport(
        rewritten=["a"],
        left={"b": DenseReason.SHORT, "c": DenseReason.SHORT, "d": DenseReason.DROPOUT},
    )
    assert report.skipped == {DenseReason.SHORT: 2, DenseReason.DROPOUT: 1}
    lines = str(report).splitlines()
    assert lines[0] == "1 attention calls rewritten, 3 left dense"
    assert lines[1:] == [f"  2 x {DenseReason.SHORT}", f"  1 x {DenseReason.DROPOUT}"]


def causal_pairs(length: int, device: Any) -> Tensor:
    position = torch.arange(length, device=device)
    return (position <= position[:, None])[None, None]


class CausalOnly(Stripes):
    """A selector that is defined for causal calls without any other mask."""

    def supports(self, *, causal: bool, masked: bool, self_attention: bool) -> bool:
        return causal and not masked


@pytest.mark.parametrize("name", ["causal", "window"])
def test_a_selector_is_asked_about_what_a_mask_is_proved_to_be(name: str) -> None:
    def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=SHORT_MASKS[name][0](query)
        )

    graph = TRACERS["dynamo"](Calls(masked), *inputs())
    report = rewrite_sdpa(graph, SparseConfig(selector=CausalOnly()))
    if name == "causal":
        assert (len(report.rewritten), report.left) == (1, {})
    else:
        assert list(report.left.values()) == [DenseReason.SELECTOR]


# Masks of a call too short to be sparse; whether SDPA's flag says all of one, and what it says.
SHORT_MASKS: dict[str, tuple[Callable[[Tensor], Tensor], bool | None]] = {
    "causal": (lambda q: causal_pairs(q.shape[2], q.device), True),
    "nothing hidden": (
        lambda q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device),
        False,
    ),
    "window": (
        lambda q: causal_pairs(q.shape[2], q.device) & ~causal_pairs(q.shape[2], q.device).tril(-9),
        None,
    ),
}


KEPT_DENSE: dict[DenseReason, dict[str, Any]] = {
    DenseReason.SLOWER: {"min_length": None},
    DenseReason.SHORT: {"min_length": LENGTH + 1},
    DenseReason.EXCLUDED: {"dense": True},
}


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("reason", KEPT_DENSE)
@pytest.mark.parametrize("name", SHORT_MASKS)
def test_a_dense_call_does_without_a_mask_that_its_flag_says(
    name: str, reason: DenseReason, lower: bool
) -> None:
    make, flag = SHORT_MASKS[name]

    def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=make(query), scale=0.5)

    graph = TRACERS["dynamo"](Calls(masked), *inputs())
    config = SparseConfig(selector=FINE, **KEPT_DENSE[reason])
    report = rewrite_sdpa(graph, config, lower=lower)
    assert list(report.left.values()) == [reason]
    assert bool(report.flagged) is (lower and flag is not None)
    (node,) = (node for node in graph.graph.nodes if is_sdpa(node))
    found = SdpaCall.bind(node.args, node.kwargs)
    if report.flagged:
        assert (found.attn_mask, found.is_causal, found.scale) == (None, flag, 0.5)
        assert "is_causal in place of a mask tensor" in str(report)
    else:
        assert found.attn_mask is not None
    torch.testing.assert_close(run(graph, *inputs()), masked(*inputs()))
