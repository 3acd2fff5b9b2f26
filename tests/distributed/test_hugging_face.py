"""Transformers' own parallel loading: ``tp_plan="auto"`` and ``device_map``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench.prefill import create_model
from unisparse_flex import UniSparse, explain, optimize
from unisparse_flex.distributed import ContextParallel

from .check import difference, gather, kept_blocks
from .ranks import Ranks

transformers = pytest.importorskip("transformers")
SELECTOR = UniSparse(block_size=16, c_q=4, c_k=4, top_k=3)
DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "lm_head": "disk",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=256,
        num_hidden_layers=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:
        # Random weights attend evenly.
        layer.self_attn.q_proj.weight.data.mul_(30)
        layer.self_attn.k_proj.weight.data.mul_(30)
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


def load(path: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)


def prompt() -> torch.Tensor:
    return torch.randint(256, (2, 200), generator=torch.Generator().manual_seed(0))


def run_tensor_parallel(path: Path, compiled: bool) -> tuple[float, bool]:
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    plan = transformers.distributed.DistributedConfig(tp_plan="auto")
    ids, layers = prompt(), {"num_hidden_layers": 1 if compiled else 2}
    alone = optimize(load(path, **layers), SELECTOR, min_length=0)
    model = optimize(load(path, distributed_config=plan, **layers), SELECTOR, min_length=0)
    with torch.no_grad():
        pairs = zip(
            kept_blocks(lambda: model(ids, use_cache=False)),
            kept_blocks(lambda: alone(ids, use_cache=False)),
            strict=True,
        )
        same = all(torch.equal(gather(mine, 1), whole) for mine, whole in pairs)
        run = torch.compile(model) if compiled else model
        output = run(ids, use_cache=False).logits
        return difference(output, alone(ids, use_cache=False).logits), same


def test_a_model_loaded_with_a_tp_plan_equals_one_process(two: Ranks, llama: Path) -> None:
    for compiled in (False, True):
        for error, same in two.run(run_tensor_parallel, llama, compiled, seconds=120):
            assert same
            assert error < 1e-5


def test_a_model_spread_by_a_device_map_is_sparse(llama: Path, tmp_path: Path) -> None:
    ids = prompt()
    alone = optimize(load(llama), SELECTOR, min_length=0)
    model = load(llama, device_map=DEVICE_MAP, offload_folder=tmp_path)
    optimize(model, SELECTOR, min_length=0)
    with torch.no_grad():
        assert len(explain(model, ids, use_cache=False).sparse) == 2
        output = model(ids, use_cache=False).logits
        assert difference(output, alone(ids, use_cache=False).logits) < 1e-6


def run_context() -> float:
    """A Llama over tokens that ranks share: positions go with them, and it builds no mask."""
    context = ContextParallel(block_size=16)
    ids = prompt()
    alone, model = (create_model(2, "cpu", small=True) for _ in range(2))
    for layer in (*alone.model.layers, *model.model.layers):
        layer.self_attn.q_proj.weight.data.mul_(30)
        layer.self_attn.k_proj.weight.data.mul_(30)
    optimize(alone, SELECTOR, min_length=0)
    optimize(model, SELECTOR, min_length=0, context=context)
    positions = context.shard(torch.arange(ids.shape[1])[None], 1)
    with torch.no_grad():
        own = model(context.shard(ids, 1), position_ids=positions, use_cache=False).logits
        expected = alone(ids, use_cache=False).logits
        return difference(context.gather(own, 1), expected)


def test_a_llama_over_shared_tokens_equals_one_process(two: Ranks) -> None:
    assert all(error < 1e-5 for error in two.run(run_context))


def run_stock_context(path: Path) -> float:
    """Stock Transformers, uncompiled: rows in one run make it build no mask."""
    context = ContextParallel(block_size=16, balanced=False)
    ids = prompt()
    alone = optimize(load(path), SELECTOR, min_length=0)
    model = optimize(load(path), SELECTOR, min_length=0, context=context)
    positions = context.shard(torch.arange(ids.shape[1])[None], 1)
    with torch.no_grad():
        own = model(context.shard(ids, 1), position_ids=positions, use_cache=False).logits
        return difference(context.gather(own, 1), alone(ids, use_cache=False).logits)


def test_stock_transformers_over_single_runs_equal_one_process(two: Ranks, llama: Path) -> None:
    assert all(error < 1e-5 for error in two.run(run_stock_context, llama))
