"""An optimized model whose attention sees some of the tokens, eager and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests.api.models import FINE, Transformer, create, embeddings, qkv
from unisparse_flex import (
    Selector,
    UniSparse,
    attention,
    explain,
    optimize,
    restore,
    temporarily_optimize,
)
from unisparse_flex.distributed import ContextParallel, context_parallel_attention
from unisparse_flex.passes import DenseReason
from unisparse_flex.selectors import FlexPrefill

from .check import difference, kept_blocks
from .ranks import Ranks

LENGTH = 203


def run_model(selector: Selector, compiled: bool) -> tuple[float, bool]:
    torch._dynamo.reset()
    context = ContextParallel(block_size=16)
    x = embeddings(LENGTH, batch=2)
    layers = 1 if compiled else 2
    alone = optimize(create(layers=layers), selector, min_length=0)
    model: Any = optimize(create(layers=layers), selector, min_length=0, context=context)
    run = torch.compile(model, fullgraph=True) if compiled else model
    with torch.no_grad():
        output = context.gather(run(context.shard(x, 1)), 1)
        return difference(output, alone(x)), bool(context.received["blocks"])


def test_a_model_over_shards_equals_one_process(four: Ranks) -> None:
    for error, fetched in four.run(run_model, FINE, False):
        assert fetched
        assert error < 1e-5


def test_a_compiled_model_over_shards_equals_one_process(two: Ranks) -> None:
    for error, fetched in two.run(run_model, FINE, True, seconds=120):
        assert fetched
        assert error < 1e-5


@pytest.mark.parametrize(
    "options",
    [{"dense_layers": (0, 1)}, {"selector": FlexPrefill(block_size=16)}],
    ids=["excluded", "not_row_by_row"],
)
def test_dense_calls_see_the_keys_of_all_ranks(two: Ranks, options: dict[str, Any]) -> None:
    for error, fetched in two.run(run_dense, options):
        assert not fetched
        assert error < 1e-5


def run_dense(options: dict[str, Any]) -> tuple[float, bool]:
    context = ContextParallel(block_size=16)
    x = embeddings(LENGTH, batch=2)
    settings = {"selector": FINE, "min_length": 0, **options}
    model: Any = optimize(create(), context=context, **settings)
    with torch.no_grad():
        output = context.gather(model(context.shard(x, 1)), 1)
        return difference(output, create()(x)), bool(context.received["blocks"])


def run_dense_patched() -> float:
    own: Any = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            F, "scaled_dot_product_attention", lambda q, *rest, **o: own(2 * q, *rest, **o)
        )
        return run_dense({"dense_layers": (0, 1)})[0]


def test_dense_calls_run_a_patch_once(two: Ranks) -> None:
    assert max(two.run(run_dense_patched)) < 1e-5


def explain_ranks() -> list[tuple[str, int, int, float | None, DenseReason | None]]:
    context = ContextParallel(block_size=16)
    model = optimize(create(layers=2), FINE, min_length=0, dense_layers=(1,), context=context)
    found = explain(model, context.shard(embeddings(LENGTH), 1))
    return [(c.layer, c.q_len, c.kv_len, c.density, c.reason) for c in found.calls]


def test_explain_has_a_record_for_each_run_of_rows(two: Ranks) -> None:
    first, second = two.run(explain_ranks)
    # Rank 0 holds the first and the last of four chunks, rank 1 the two between.
    assert [call[:3] for call in first] == [
        ("layers.0.attention", 48, LENGTH),
        ("layers.0.attention", 59, LENGTH),
        ("layers.1.attention", 48, LENGTH),
        ("layers.1.attention", 59, LENGTH),
    ]
    assert [call[1] for call in second] == [96, 96]
    assert [call[4] for call in second] == [None, DenseReason.EXCLUDED]
    assert second[0][3] is not None


def run_inside_sparse() -> tuple[float, float, str]:
    """Errors inside a block that names the context and behind it; then what one without it says."""
    context = ContextParallel(block_size=16)
    x = embeddings(LENGTH)
    model = create()
    with torch.no_grad():
        with temporarily_optimize(model, FINE, min_length=0, context=context):
            output = context.gather(model(context.shard(x, 1)), 1)
        alone = optimize(create(), FINE, min_length=0)
        inside, behind = difference(output, alone(x)), difference(model(x), create()(x))
    optimize(model, FINE, min_length=0, context=context)
    try:
        with temporarily_optimize(model, FINE):
            return inside, behind, "no error"
    except ValueError as error:
        return inside, behind, str(error)


def test_a_block_can_be_for_shared_tokens(two: Ranks) -> None:
    for inside, behind, message in two.run(run_inside_sparse):
        assert inside < 1e-5
        assert behind < 1e-6
        assert message.startswith("context must be given")


def change_settings() -> tuple[float, float, float]:
    """Errors of one compiled model: optimized with a context, then without, then restored."""
    torch._dynamo.reset()
    context = ContextParallel(block_size=16)
    x = embeddings(LENGTH)
    model: Any = create(layers=1)
    optimize(model, FINE, min_length=0, context=context)
    run: Any = torch.compile(model, backend="aot_eager")
    alone = optimize(create(layers=1), FINE, min_length=0)
    with torch.no_grad():
        sharded = difference(context.gather(run(context.shard(x, 1)), 1), alone(x))
        optimize(model, FINE, min_length=0)
        whole = difference(run(x), alone(x))
        restore(run)
        return sharded, whole, difference(run(x), create(layers=1)(x))


def test_a_compiled_model_forgets_its_context(two: Ranks) -> None:
    for errors in two.run(change_settings):
        assert max(errors) < 1e-5


class Rotary(nn.Module):
    """A layer whose attention depends on positions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = create(Transformer, layers=1)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angle = positions[..., None] / 10000 ** (torch.arange(x.shape[-1]) / x.shape[-1])
        return self.inner(x * angle.cos())


def run_positions() -> float:
    context = ContextParallel(block_size=16)
    x, positions = embeddings(LENGTH), torch.arange(LENGTH)
    alone = optimize(create(Rotary), FINE, min_length=0)
    model: Any = optimize(create(Rotary), FINE, min_length=0, context=context)
    own = context.layout(LENGTH).positions(context.rank)
    with torch.no_grad():
        output = context.gather(model(context.shard(x, 1), own), 1)
        return difference(output, alone(x, positions))


def test_positions_go_with_their_tokens(four: Ranks) -> None:
    assert all(error < 1e-5 for error in four.run(run_positions))


def count_bytes(top_k: int) -> tuple[dict[str, int], int, int]:
    """What a rank received in one layer, what its rows need of others, and a block's bytes."""
    context = ContextParallel(block_size=16)
    selector = UniSparse.paper(block_size=16, c_q=4, c_k=4, top_k=top_k, last_query_blocks=0)
    model: Any = optimize(create(layers=1), selector, min_length=0, context=context)
    x = context.shard(embeddings(LENGTH), 1)
    with torch.no_grad():
        keep = torch.cat(kept_blocks(lambda: model(x)), dim=2)
    needed = keep.any(2).unflatten(1, (2, 2)).any(2)
    for span in context.layout(LENGTH).blocks(context.rank):
        needed[..., slice(*span)] = False
    return dict(context.received), int(needed.sum()), 16 * (16 + 16) * 4


def test_only_blocks_that_a_local_row_keeps_are_fetched(four: Ranks) -> None:
    for received, needed, block_bytes in four.run(count_bytes, 2):
        assert "keys" not in received
        assert received["blocks"] == needed * block_bytes
        assert needed < 2 * 13 * 3 // 4


def test_the_group_is_the_one_of_the_mesh(four: Ranks) -> None:
    assert four.run(run_halves) == [(r // 2, r % 2) for r in range(4)]


def run_halves() -> tuple[int, int]:
    """Two contexts of two ranks each, side by side: which half and which rank in it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    context = ContextParallel(mesh["context"], block_size=16)
    half = dist.get_rank() // 2
    x = embeddings(LENGTH, seed=half)
    alone = optimize(create(), FINE, min_length=0)
    model: Any = optimize(create(), FINE, min_length=0, context=context)
    with torch.no_grad():
        assert difference(context.gather(model(context.shard(x, 1)), 1), alone(x)) < 1e-5
    return half, context.rank


def run_heads_and_tokens() -> float:
    """Heads over two ranks, tokens over two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("heads", "context"))
    context = ContextParallel(mesh["context"], block_size=16)
    model: Any = optimize(create(), FINE, min_length=0, context=context)
    columns = {name: ColwiseParallel() for name in ("query", "key", "value")}
    for layer in model.layers:
        plan: Any = {**columns, "out": RowwiseParallel()}
        parallelize_module(layer.attention, mesh["heads"], plan)
    x = embeddings(LENGTH, batch=2)
    alone = optimize(create(), FINE, min_length=0)
    with torch.no_grad():
        return difference(context.gather(model(context.shard(x, 1)), 1), alone(x))


def test_heads_and_tokens_can_both_be_shared(four: Ranks) -> None:
    assert all(error < 1e-5 for error in four.run(run_heads_and_tokens))


def run_encoder() -> tuple[float, bool]:
    """`nn.MultiheadAttention`, not causal."""
    context = ContextParallel(block_size=16)
    encoder = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True, dropout=0.0)
    state = {
        k: torch.randn(v.shape, generator=torch.Generator().manual_seed(v.numel())) * 0.2
        for k, v in encoder.state_dict().items()
    }
    models: list[Any] = []
    for _ in range(2):
        models.append(nn.TransformerEncoderLayer(64, 4, 64, batch_first=True, dropout=0.0).eval())
        models[-1].load_state_dict(state)
    x = embeddings(LENGTH, batch=2)
    alone = optimize(models[0], FINE, min_length=0)
    model = optimize(models[1], FINE, min_length=0, context=context)
    with torch.no_grad():
        output = context.gather(model(context.shard(x, 1)), 1)
        return difference(output, alone(x)), bool(context.received["blocks"])


def test_an_encoder_over_shards_equals_one_process(two: Ranks) -> None:
    for error, fetched in two.run(run_encoder):
        assert fetched
        assert error < 1e-5


def run_function() -> list[float]:
    """`context_parallel_attention` inside somebody's compiled function, at several lengths."""
    torch._dynamo.reset()
    context = ContextParallel(block_size=16)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = context_parallel_attention(
            2 * query, key, value, context=context, selector=FINE, is_causal=True
        )
        return output + 1

    run = torch.compile(attend, fullgraph=True, backend="aot_eager")
    errors = []
    for length in (LENGTH, 160, 333):
        query, key, value = qkv(length, batch=2)
        expected = attention(2 * query, key, value, is_causal=True, enable_gqa=True, selector=FINE)
        with torch.no_grad():
            output = run(*(context.shard(t, 2) for t in (query, key, value)))
        errors.append(difference(context.gather(output - 1, 2), expected))
    return errors


def test_a_compiled_function_takes_other_lengths(two: Ranks) -> None:
    for errors in two.run(run_function):
        assert max(errors) < 1e-5
