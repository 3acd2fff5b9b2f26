"""Every reason to stay dense: the pass leaves the call alone, names the reason and logs it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tests.api.models import FINE
from unisparse_flex import UniSparse
from unisparse_flex.passes import DenseReason, SparseConfig, rewrite_sdpa
from unisparse_flex.passes.calls.sdpa import SdpaCall
from unisparse_flex.passes.decision.refusals import refuse
from unisparse_flex.selectors import FlexPrefill, MInference, StreamingLLM

from .graphs import build_graph

CONFIG = SparseConfig(selector=FINE)
# Found by `explain`, or only where a graph holds no shapes.
# Those of a multi-head call: test_multihead.py
NOT_THE_PASS = {
    *{DenseReason.NOT_OPTIMIZED, DenseReason.NEEDS_WEIGHTS, DenseReason.KEYS_OF_ITS_OWN},
    # Of a machine's rates: test_cost_decision.py
    DenseReason.KEEPS_MOST,
    # Of a GPU that nobody measured: test_first_output.py
    DenseReason.KERNEL_FAILS,
    # Of ranks: tests/distributed.
    *{
        DenseReason.SHARDED_TOKENS,
        DenseReason.SHARDED_UNLIKE,
        DenseReason.SPLIT_GROUP,
        DenseReason.NOT_ROW_BY_ROW,
    },
}


def tensor(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape or (2, 4, 64, 16), **options)


def on(
    device: str, dtype: torch.dtype = torch.float32, head_dim: int = 64, length: int = 64
) -> dict[str, Any]:
    shape = (2, 4, length, head_dim)
    return {n: tensor(*shape, device=device, dtype=dtype) for n in ("query", "key", "value")}


def on_cuda(requires_grad: bool = False, **options: Any) -> dict[str, Any]:
    with FakeTensorMode():
        tensors = on("cuda", **options)
    return {name: t.requires_grad_(requires_grad) for name, t in tensors.items()}


BOOL = tensor(64, 64).bool()
PLAIN = SdpaCall(query=tensor(), key=tensor(), value=tensor())

CAUSAL_ONLY = FlexPrefill(block_size=16)

REFUSED: list[tuple[DenseReason, dict[str, Any], dict[str, Any]]] = [
    (DenseReason.SELECTOR, {}, {"selector": CAUSAL_ONLY}),
    (DenseReason.SELECTOR, {"attn_mask": BOOL}, {"selector": MInference(block_size=16)}),
    (
        DenseReason.SELECTOR,
        {"key": tensor(2, 4, 80, 16), "value": tensor(2, 4, 80, 16)},
        {"selector": StreamingLLM(block_size=16)},
    ),
    (DenseReason.EXCLUDED, {}, {"dense": True}),
    (DenseReason.DROPOUT, {"dropout_p": 0.1}, {}),
    (DenseReason.DROPOUT, {"dropout_p": -0.1}, {}),
    (DenseReason.NOT_DENSE, {"query": tensor().to_sparse()}, {}),
    (DenseReason.NOT_DENSE, {"attn_mask": BOOL.to_sparse()}, {}),
    (DenseReason.NOT_4D, {"query": tensor(4, 64, 16)}, {}),
    (DenseReason.NOT_4D, {"key": tensor(1, 2, 4, 64, 16)}, {}),
    (DenseReason.NOT_4D, {"value": tensor(4, 64, 16)}, {}),
    (DenseReason.FEW_QUERIES, {}, {"min_queries": 65}),
    (DenseReason.FEW_QUERIES, {"query": tensor(2, 4, 0, 16)}, {}),
    (DenseReason.SHORT, {}, {"min_length": 65}),
    (DenseReason.SHORT, {"key": tensor(2, 4, 0, 16), "value": tensor(2, 4, 0, 16)}, {}),
    (DenseReason.HEADS, {"key": tensor(2, 2, 64, 16), "value": tensor(2, 2, 64, 16)}, {}),
    (DenseReason.HEADS, {"query": tensor(2, 6, 64, 16), "enable_gqa": True}, {}),
    (DenseReason.HEADS, {"query": tensor(3, 4, 64, 16)}, {}),
    (DenseReason.HEADS, {"query": tensor(2, 1, 64, 16), "enable_gqa": True}, {}),
    (DenseReason.HEADS, {"query": tensor(2, 4, 64, 8)}, {}),
    (DenseReason.HEADS, {"query": tensor(2, 4, 64, 0), "key": tensor(2, 4, 64, 0)}, {}),
    (DenseReason.HEADS, {"value": tensor(2, 4, 63, 16)}, {}),
    (DenseReason.HEADS, {"value": tensor(2, 2, 64, 16)}, {}),
    (DenseReason.BROADCAST, {"query": tensor(1, 4, 64, 16)}, {}),
    (DenseReason.BROADCAST, {"query": tensor(2, 1, 64, 16)}, {}),
    (DenseReason.BROADCAST, {"key": tensor(2, 1, 64, 16), "value": tensor(2, 1, 64, 16)}, {}),
    (DenseReason.BROADCAST, {"key": tensor(1, 4, 64, 16), "value": tensor(1, 1, 64, 16)}, {}),
    (DenseReason.BROADCAST, {"value": tensor(1, 4, 64, 16)}, {}),
    (DenseReason.BROADCAST, {"key": tensor(2, 2, 64, 16), "enable_gqa": True}, {}),
    (DenseReason.DTYPE, {"query": tensor(dtype=torch.int64)}, {}),
    (DenseReason.DTYPE, {"key": tensor(dtype=torch.float64)}, {}),
    (DenseReason.DTYPE, {"value": tensor(dtype=torch.bfloat16)}, {}),
    (DenseReason.DTYPE, {"attn_mask": tensor(64, 64, dtype=torch.int64)}, {}),
    (DenseReason.DTYPE, {"attn_mask": tensor(64, 64, dtype=torch.float8_e4m3fn)}, {}),
    (DenseReason.DEVICE, on("meta"), {}),
    (DenseReason.DEVICE, {"value": tensor(device="meta")}, {}),
    (DenseReason.DEVICE, {"attn_mask": tensor(64, 64, device="meta")}, {}),
    (DenseReason.MASK_AND_CAUSAL, {"attn_mask": BOOL, "is_causal": True}, {}),
    (DenseReason.MASK_AND_CAUSAL, {"attn_mask": BOOL, "causal_lower_right": True}, {}),
    (DenseReason.MASK_AND_CAUSAL, {"is_causal": True, "causal_lower_right": True}, {}),
    (DenseReason.MASK_SHAPE, {"attn_mask": tensor(64, 63).bool()}, {}),
    (DenseReason.MASK_SHAPE, {"attn_mask": tensor(3, 1, 64, 64).bool()}, {}),
    (DenseReason.MASK_SHAPE, {"attn_mask": tensor(1, 2, 4, 64, 64).bool()}, {}),
    (DenseReason.MASK_GRADIENT, {"attn_mask": tensor(64, 64, requires_grad=True)}, {}),
    (
        DenseReason.CAUSAL_ROWS_WITHOUT_KEYS,
        {"query": tensor(2, 4, 65, 16), "causal_lower_right": True},
        {},
    ),
    (DenseReason.SLOWER, {}, {"min_length": None}),
    (DenseReason.NO_KERNEL, {"attn_mask": BOOL}, {"min_length": None}),
    (DenseReason.CPU_GRADIENT, {"query": tensor(requires_grad=True)}, {"min_length": None}),
    (DenseReason.KERNEL, on_cuda(dtype=torch.float64), {}),
    (DenseReason.KERNEL, on_cuda(head_dim=8), {}),
    (DenseReason.BACKWARD_BLOCK, on_cuda(requires_grad=True), {}),
]

ALLOWED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"min_length": 64, "min_queries": 64}),
    (on("cpu", length=8192), {"min_length": None, "selector": UniSparse()}),
    ({"query": tensor(2, 8, 64, 16), "enable_gqa": True}, {}),
    ({"value": tensor(2, 4, 64, 8)}, {}),
    ({"query": tensor(2, 4, 65, 16), "is_causal": True}, {}),
    ({"attn_mask": tensor(2, 1, 1, 64)}, {}),
    ({"attn_mask": tensor(64, dtype=torch.float64).bool()}, {}),
    (on("cpu", torch.float64), {}),
    (on_cuda(dtype=torch.float16), {}),
    (on_cuda(requires_grad=True), {"selector": UniSparse(block_size=128)}),
]


@pytest.mark.parametrize(("reason", "changes", "settings"), REFUSED)
def test_the_pass_leaves_the_call_with_its_reason(
    reason: DenseReason,
    changes: dict[str, Any],
    settings: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    call, config = replace(PLAIN, **changes), replace(CONFIG, **settings)
    if call.causal_lower_right:
        graph = build_graph(
            call, torch.ops.unisparse.sdpa, causal_lower_right=True, config=config.encode()
        )
    else:
        graph = build_graph(call, F.scaled_dot_product_attention)
    before = str(graph)
    with caplog.at_level(logging.DEBUG, "unisparse_flex"):
        report = rewrite_sdpa(graph, config)
    assert list(report.left.values()) == [reason]
    assert report.skipped == {reason: 1}
    assert report.rewritten == []
    assert str(graph) == before
    assert f"stays dense: {reason}" in caplog.text


@pytest.mark.parametrize(("changes", "settings"), ALLOWED)
def test_the_pass_takes_what_no_reason_speaks_against(
    changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    call, config = replace(PLAIN, **changes), replace(CONFIG, **settings)
    report = rewrite_sdpa(build_graph(call, F.scaled_dot_product_attention), config)
    assert (len(report.rewritten), report.left) == (1, {})


@pytest.mark.parametrize(
    ("reason", "changes"),
    [(r, c) for r, c, _ in REFUSED if r in (DenseReason.HEADS, DenseReason.BROADCAST)],
)
def test_sizes_that_do_not_go_together_are_told_from_those_that_sdpa_broadcasts(
    reason: DenseReason, changes: dict[str, Any]
) -> None:
    call = replace(PLAIN, **changes)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=call.enable_gqa)

    if reason is DenseReason.BROADCAST:
        output = run(call.query, call.key, call.value)
        assert output.shape[:3] == (2, 4, 64)
        # What the reason advises is taken.
        batched = [t.expand(2, -1, -1, -1) for t in (call.query, call.key, call.value)]
        expanded = [t.repeat_interleave(4 // t.shape[1], dim=1) for t in batched]
        query, key, value = expanded
        assert refuse(replace(call, query=query, key=key, value=value), CONFIG) is None
        torch.testing.assert_close(run(query, key, value), output)
    elif call.query.shape[-1] > 0 and call.key.shape[2] == call.value.shape[2]:
        with pytest.raises(RuntimeError):
            run(call.query, call.key, call.value)


def test_every_reason_of_the_pass_is_reached() -> None:
    assert {reason for reason, _, _ in REFUSED} == set(DenseReason) - NOT_THE_PASS


def test_a_mask_with_a_gradient_is_taken_where_none_is_recorded() -> None:
    call = replace(PLAIN, attn_mask=tensor(64, 64, requires_grad=True))
    with torch.no_grad():
        assert refuse(call, CONFIG) is None


def test_autocast_takes_tensors_that_it_makes_alike() -> None:
    call = replace(PLAIN, key=tensor(dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert refuse(call, CONFIG) is None


def test_excluded_is_known_before_any_shape() -> None:
    graph = build_graph(PLAIN, F.scaled_dot_product_attention)
    for node in graph.nodes:
        node.meta.clear()
    report = rewrite_sdpa(graph, replace(CONFIG, dense=True))
    assert list(report.left.values()) == [DenseReason.EXCLUDED]


def test_a_kept_call_is_logged_as_a_count(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "unisparse_flex"):
        rewrite_sdpa(build_graph(PLAIN, F.scaled_dot_product_attention), CONFIG)
    assert "1 attention calls rewritten, 0 left dense" in caplog.text
