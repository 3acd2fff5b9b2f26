"""The density of a model counts what stays dense as all of its blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from unisparse_flex import UniSparse, optimize
from unisparse_flex.evaluation.read_blocks import watch_blocks
from unisparse_flex.optimization import optimize_layers

FEW = UniSparse(block_size=32, c_q=8, c_k=8, top_p=0.3)
IDS = torch.arange(400)[None] % 97


def create(window: int | None = None) -> Any:
    """Two layers, the first with a sliding window where one is given."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    kinds = ["full_attention" if window is None else "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        layer_types=kinds,
        sliding_window=window or 4096,
        attn_implementation="sdpa",
    )
    return Gemma3ForCausalLM(config).eval()


@torch.no_grad()
def watched(model: Any, ids: torch.Tensor = IDS) -> Any:
    with watch_blocks(model) as found:
        model(ids, use_cache=False)
    return found


def test_an_excluded_layer_counts_as_all_of_its_blocks():
    found = watched(optimize(create(), FEW, min_length=0, dense_layers=(0,)))
    assert (len(found.records), len(found.sparse), found.left_dense) == (2, 1, 1)
    (kept,) = (record.density for record in found.sparse)
    assert found.sparse_density == kept < 1
    assert found.density == pytest.approx((1 + kept) / 2)


def test_a_layer_that_a_calibration_keeps_dense_counts_as_all_of_its_blocks():
    model = create()
    names = [f"model.layers.{index}.self_attn" for index in range(2)]
    optimize_layers(model, {names[0]: FEW, names[1]: "dense"}, min_length=0)
    found = watched(model)
    assert found.density == pytest.approx((1 + found.sparse_density) / 2)


def test_without_a_sparse_call_there_is_no_density():
    everywhere = watched(optimize(create(), FEW, min_length=0))
    assert (everywhere.left_dense, everywhere.density) == (0, everywhere.sparse_density)
    slow = watched(optimize(create(), FEW, min_length=4096))
    assert (slow.left_dense, slow.density, slow.sparse_density) == (2, None, None)


def test_a_narrow_window_is_left_out_whether_it_is_sparse_or_not():
    sparse = watched(optimize(create(window=32), FEW, min_length=0))
    assert (sparse.windows, sparse.left_dense) == (1, 0)
    excluded = watched(optimize(create(window=32), FEW, min_length=0, dense_layers=(0,)))
    assert (excluded.windows, excluded.left_dense) == (0, 0)
    assert excluded.density == pytest.approx(sparse.density)


def test_decoding_is_not_counted():
    model = optimize(create(), FEW, min_length=0, dense_layers=(0,))
    with watch_blocks(model) as found:
        model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert (len(found.records), len(found.sparse), found.left_dense) == (6, 1, 1)
