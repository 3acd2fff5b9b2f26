"""FSDP2, DDP, activation checkpointing and pipeline stages: nothing to configure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tests.api.models import FINE, Transformer, create, embeddings
from unisparse_flex import is_optimized, optimize, restore

from .check import difference, kept_blocks, mesh
from .ranks import Ranks

LENGTH = 72


class Checkpointed(Transformer):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def shard(model: Any) -> Any:
    """As models of many layers are sharded: each layer, then the rest."""
    for layer in model.layers:
        fully_shard(layer, mesh=mesh())
    return fully_shard(model, mesh=mesh())


def wrap(kind: str, *, first: bool, layers: int = 2) -> Any:
    model = create(Checkpointed if kind == "checkpointed" else Transformer, layers=layers)
    if first:
        optimize(model, FINE, min_length=0)
    wrapped = DistributedDataParallel(model) if kind == "ddp" else shard(model)
    if not first:
        optimize(wrapped, FINE, min_length=0)
    return wrapped


def own_batch() -> tuple[Tensor, Tensor]:
    """The batch of all ranks, and this rank's element."""
    x = embeddings(LENGTH, batch=dist.get_world_size())
    return x, x[dist.get_rank() :][:1]


def train(kind: str, first: bool) -> tuple[float, float, bool]:
    """Errors of outputs and gradients against one process, and whether blocks are the same."""
    whole, mine = own_batch()
    alone = optimize(create(), FINE, min_length=0)
    rank = dist.get_rank()
    with torch.no_grad():
        kept = kept_blocks(lambda: alone(whole))
    expected = alone(whole)
    expected.square().mean().backward()

    model = wrap(kind, first=first)
    with torch.no_grad():
        same = all(
            torch.equal(one, all_of[rank : rank + 1])
            for one, all_of in zip(kept_blocks(lambda: model(mine)), kept, strict=True)
        )
    output = model(mine)
    output.square().mean().backward()
    inner = model.module if kind == "ddp" else model
    pairs = zip(inner.parameters(), alone.parameters(), strict=True)
    error = max(difference(_whole(one.grad), other.grad) for one, other in pairs)
    return difference(output, expected[rank : rank + 1]), error, same


def _whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


@pytest.mark.parametrize("first", [True, False], ids=["optimized_first", "wrapped_first"])
@pytest.mark.parametrize("kind", ["fsdp", "ddp", "checkpointed"])
def test_training_over_ranks_equals_one_process(two: Ranks, kind: str, first: bool) -> None:
    for output_error, gradient_error, same in two.run(train, kind, first):
        assert same
        assert output_error < 1e-5
        assert gradient_error < 1e-4


def infer_compiled(first: bool) -> float:
    whole, mine = own_batch()
    rank = dist.get_rank()
    alone = optimize(create(layers=1), FINE, min_length=0)
    model = torch.compile(wrap("fsdp", first=first, layers=1))
    with torch.no_grad():
        return difference(model(mine), alone(whole)[rank : rank + 1])


def test_a_compiled_fsdp_model_equals_one_process(two: Ranks) -> None:
    assert all(error < 1e-5 for error in two.run(infer_compiled, True, seconds=120))


def restore_sharded() -> tuple[bool, bool, float]:
    _, mine = own_batch()
    model = wrap("fsdp", first=True)
    restore(model)
    with torch.no_grad():
        return (
            is_optimized(model),
            hasattr(model, "unshard"),
            difference(model(mine), create()(mine)),
        )


def test_a_sharded_model_can_be_restored(two: Ranks) -> None:
    for optimized, sharded, error in two.run(restore_sharded):
        assert not optimized
        assert sharded
        assert error < 1e-5


def run_pipeline(compiled: bool) -> tuple[float, bool]:
    rank, stages = dist.get_rank(), dist.get_world_size()
    x = embeddings(LENGTH, batch=4)
    alone = optimize(create(layers=stages), FINE, min_length=0)
    own: nn.Module = optimize(create(layers=stages), FINE, min_length=0).layers[rank]
    stage = PipelineStage(
        torch.compile(own) if compiled else own,  # type: ignore[arg-type]
        rank,
        stages,
        torch.device("cpu"),
        input_args=(x[:2],),
        output_args=(x[:2],),
    )
    schedule = ScheduleGPipe(stage, n_microbatches=2)
    with torch.no_grad():
        output = schedule.step(x) if rank == 0 else schedule.step()
        expected = alone(x)
    if rank < stages - 1:
        return 0.0, output is None
    return difference(output, expected), True


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_stages_of_a_pipeline_equal_one_process(two: Ranks, compiled: bool) -> None:
    for error, expected_end in two.run(run_pipeline, compiled):
        assert expected_end
        assert error < 1e-5
