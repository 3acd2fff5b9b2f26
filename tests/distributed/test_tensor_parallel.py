"""Tensor parallel: ranks hold whole GQA groups, and keep the blocks that one process keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests.api.models import FINE, Transformer, create, embeddings, qkv
from unisparse_flex import Calibration, Selector, UniSparse, attention, optimize
from unisparse_flex.distributed import shard_heads
from unisparse_flex.passes import DenseReason, SparseConfig
from unisparse_flex.passes.calls.sdpa import SdpaCall
from unisparse_flex.passes.decision.refusals import refuse, refuse_sharding
from unisparse_flex.selectors import XAttention

from .check import difference, gather, kept_blocks, mesh
from .ranks import Ranks

LENGTH = 200
PLACEMENTS = {
    "heads": Shard(1),
    "batch": Shard(0),
    "tokens": Shard(2),
    "whole": Replicate(),
    "partial": Partial(),
}
THRESHOLDS = (0.01, 0.05, 0.1, 0.2)


class Call(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)


def parallelize(model: Transformer, *, local: bool, first: bool) -> None:
    """Shards heads; ``local`` attention sees plain tensors, otherwise DTensors."""
    if first:
        optimize(model, FINE, min_length=0)
    columns = ColwiseParallel() if local else ColwiseParallel(use_local_output=False)
    plan: dict[str, Any] = {
        "attention.query": columns,
        "attention.key": columns,
        "attention.value": columns,
        "attention.out": RowwiseParallel(),
        "mlp.0": ColwiseParallel(),
        "mlp.2": RowwiseParallel(),
    }
    for layer in model.layers:
        parallelize_module(layer, mesh(), plan)
    if not first:
        optimize(model, FINE, min_length=0)


def run_model(local: bool, first: bool, compiled: bool) -> tuple[float, bool]:
    torch._dynamo.reset()
    x, layers = embeddings(LENGTH, batch=2), 1 if compiled else 2
    alone = optimize(create(layers=layers), FINE, min_length=0)
    with torch.no_grad():
        expected = alone(x)
        kept = kept_blocks(lambda: alone(x))
        model = create(layers=layers)
        parallelize(model, local=local, first=first)
        same = all(
            bool((gather(mine, 1) == whole).all())
            for mine, whole in zip(kept_blocks(lambda: model(x)), kept, strict=True)
        )
        run = torch.compile(model, fullgraph=True) if compiled else model
        return difference(run(x), expected), same


@pytest.mark.parametrize("first", [True, False], ids=["optimized_first", "parallelized_first"])
@pytest.mark.parametrize("local", [True, False], ids=["tensors", "dtensors"])
def test_ranks_keep_the_blocks_of_one_process(two: Ranks, local: bool, first: bool) -> None:
    for error, same in two.run(run_model, local, first, False):
        assert same
        assert error < 1e-5


@pytest.mark.parametrize("local", [True, False], ids=["tensors", "dtensors"])
def test_a_compiled_parallel_model_equals_one_process(two: Ranks, local: bool) -> None:
    for error, same in two.run(run_model, local, False, True):
        assert same
        assert error < 1e-5


def distribute(tensors: Any, placements: Any) -> Any:
    return [
        distribute_tensor(t, mesh(), [PLACEMENTS[p]])
        for t, p in zip(tensors, placements, strict=True)
    ]


def run_call(selector: Selector, placement: str, compiled: bool) -> tuple[float, bool]:
    torch._dynamo.reset()
    tensors = qkv(LENGTH, batch=2)
    expected = attention(*tensors, is_causal=True, enable_gqa=True, selector=selector)
    run: Any = optimize(Call(), selector, min_length=0)
    if compiled:
        run = torch.compile(run, fullgraph=True)
    output = run(*distribute(tensors, [placement] * 3), is_causal=True)
    same_layout = output.placements == (PLACEMENTS[placement],)
    return difference(output.full_tensor(), expected), same_layout


@pytest.mark.parametrize("placement", ["heads", "batch", "whole"])
def test_a_call_of_dtensors_is_computed_where_they_lie(two: Ranks, placement: str) -> None:
    for error, same_layout in two.run(run_call, FINE, placement, False):
        assert same_layout
        assert error == 0


@pytest.mark.parametrize(
    "selector",
    [
        UniSparse(block_size=16, c_q=4, c_k=4, head_thresholds=THRESHOLDS),
        XAttention(block_size=16, stride=4, head_top_p=(0.5, 0.7, 0.9, 0.95)),
    ],
    ids=["UniSparse", "XAttention"],
)
def test_thresholds_of_heads_go_with_their_heads(two: Ranks, selector: Selector) -> None:
    for error, _ in two.run(run_call, selector, "heads", False):
        assert error == 0


def test_thresholds_of_heads_are_cut_while_tracing(two: Ranks) -> None:
    selector = UniSparse(block_size=16, c_q=4, c_k=4, head_thresholds=THRESHOLDS)
    for error, _ in two.run(run_call, selector, "heads", True):
        assert error < 1e-5


def run_with_thresholds() -> tuple[float, str]:
    """A model whose attention sees plain tensors: with its own thresholds, and with all."""
    x = embeddings(LENGTH, batch=2)
    selector = UniSparse(block_size=16, c_q=4, c_k=4, head_thresholds=THRESHOLDS)
    alone = optimize(create(), selector, min_length=0)
    model = create()
    parallelize(model, local=True, first=False)
    with torch.no_grad():
        optimize(model, shard_heads(selector, mesh()), min_length=0)
        error = difference(model(x), alone(x))
        optimize(model, selector, min_length=0)
        with pytest.raises(ValueError, match="each of 2 heads, got 4; where ranks hold") as found:
            model(x)
    return error, str(found.value)


def test_thresholds_of_plain_tensors_are_given_by_rank(two: Ranks) -> None:
    for error, message in two.run(run_with_thresholds):
        assert error < 1e-5
        assert "give each the shares of its own" in message


def shard_calibration() -> tuple[Any, Any]:
    setting = UniSparse(head_thresholds=THRESHOLDS)
    calibration = Calibration(
        layers={"layers.0": setting, "layers.1": "dense", "layers.2": FINE},
        quality="recall",
        target=0.9,
        reached=0.9,
        density=0.5,
        model="Model",
        unisparse_flex="0",
        torch="2",
        sizes={"layers": 3, "num_heads": 4},
    )
    sharded = shard_heads(calibration)
    assert sharded.sizes == {"layers": 3}
    layers = sharded.layers
    first: Any = layers["layers.0"]
    return first.head_thresholds, (layers["layers.1"], layers["layers.2"])


def test_a_calibration_is_cut_layer_by_layer(two: Ranks) -> None:
    rest = ("dense", FINE)
    expected = [(THRESHOLDS[:2], rest), (THRESHOLDS[2:], rest)]
    assert two.run(shard_calibration) == expected


def test_composite_heads_stay_within_a_rank(two: Ranks) -> None:
    selector = UniSparse(block_size=16, c_q=4, c_k=4, c_h=2, top_k=3)
    for error, _ in two.run(run_call, selector, "heads", False):
        assert error == 0


def run_masked(shape: tuple[int, ...], placement: str) -> float:
    tensors = qkv(LENGTH, batch=2)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.8
    mask |= torch.eye(LENGTH, dtype=torch.bool)
    expected = attention(*tensors, attn_mask=mask, enable_gqa=True, selector=FINE)
    given = distribute_tensor(mask, mesh(), [PLACEMENTS[placement]])
    run = optimize(Call(), FINE, min_length=0)
    output = run(*distribute(tensors, ["heads"] * 3), attn_mask=given)
    return difference(output.full_tensor(), expected)


@pytest.mark.parametrize(
    ("shape", "placement"),
    [
        ((2, 4, LENGTH, LENGTH), "heads"),
        ((2, 1, LENGTH, LENGTH), "whole"),
        ((LENGTH, LENGTH), "whole"),
    ],
)
def test_a_mask_goes_along(two: Ranks, shape: tuple[int, ...], placement: str) -> None:
    assert all(error == 0 for error in two.run(run_masked, shape, placement))


def find_reason(heads: tuple[int, int], placements: list[str], mask: str) -> DenseReason | None:
    query, key, value = distribute(qkv(LENGTH, heads=heads, batch=2), placements)
    call = SdpaCall(query=query, key=key, value=value, is_causal=not mask)
    if mask:
        whole = torch.ones(2, heads[0], LENGTH, LENGTH, dtype=torch.bool)
        given = distribute_tensor(whole, mesh(), [PLACEMENTS[mask]])
        call = SdpaCall(query=query, key=key, value=value, attn_mask=given)
    return refuse(call, SparseConfig(selector=FINE))


@pytest.mark.parametrize(
    ("heads", "placements", "mask", "reason"),
    [
        ((4, 2), ["tokens"] * 3, "", DenseReason.SHARDED_TOKENS),
        ((4, 2), ["heads", "tokens", "tokens"], "", DenseReason.SHARDED_TOKENS),
        ((4, 2), ["heads", "whole", "whole"], "", DenseReason.SHARDED_UNLIKE),
        ((4, 2), ["partial"] * 3, "", DenseReason.SHARDED_UNLIKE),
        ((4, 2), ["heads"] * 3, "whole", DenseReason.SHARDED_UNLIKE),
        ((4, 1), ["heads"] * 3, "", DenseReason.SPLIT_GROUP),
        ((3, 3), ["heads"] * 3, "", DenseReason.SPLIT_GROUP),
        ((4, 2), ["heads"] * 3, "", None),
    ],
)
def test_other_shardings_are_refused_by_name(
    two: Ranks,
    heads: tuple[int, int],
    placements: list[str],
    mask: str,
    reason: DenseReason | None,
) -> None:
    assert two.run(find_reason, heads, placements, mask) == [reason] * 2


def refuse_three_dimensions(placement: str) -> DenseReason | None:
    """Dimension 1 is heads in four dimensions alone."""
    tensors = [t[:, 0] for t in qkv(LENGTH, heads=(2, 2), batch=2)]
    query, key, value = distribute(tensors, [placement] * 3)
    return refuse_sharding(SdpaCall(query=query, key=key, value=value))


def test_three_dimensions_are_left_to_pytorch(two: Ranks) -> None:
    for placement in ("heads", "batch"):
        assert two.run(refuse_three_dimensions, placement) == [DenseReason.NOT_4D] * 2


def call_by_name() -> None:
    query, key, value = distribute(qkv(LENGTH), ["tokens"] * 3)
    attention(query, key, value, is_causal=True, enable_gqa=True, selector=FINE)


def test_attention_by_name_raises_on_sharded_tokens(two: Ranks) -> None:
    for failure in two.attempt(call_by_name):
        assert failure.kind == "NotImplementedError"
        assert str(DenseReason.SHARDED_TOKENS) in failure.message


def find_gradients() -> list[float]:
    tensors = qkv(LENGTH, batch=2)
    leaves = [t.clone().requires_grad_() for t in tensors]
    sharded = [t.requires_grad_() for t in distribute(tensors, ["heads"] * 3)]
    for query, key, value in (leaves, sharded):
        output = attention(query, key, value, is_causal=True, enable_gqa=True, selector=FINE)
        output.square().sum().backward()
    return [
        difference(mine.grad.full_tensor(), whole.grad)  # type: ignore[arg-type]
        for mine, whole in zip(sharded, leaves, strict=True)
    ]


def test_gradients_of_dtensors_equal_one_process(two: Ranks) -> None:
    assert all(max(errors) < 1e-5 for errors in two.run(find_gradients))
