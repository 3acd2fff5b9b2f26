"""The density of a model counts what stays dense as all of its blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from unisparse_flex import UniSparse, calibrate, optimize
from unisparse_flex.evaluation.read_blocks import watch_blocks
from unisparse_flex.evaluation.recall import CaptureAttention, compute_recall
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


@pytest.mark.parametrize("window", [None, 32, 4096])
@pytest.mark.parametrize("target", [{"recall": 0.6}, {"recall": 1.0}, {"kl": 0.5}])
def test_a_calibration_expects_the_density_that_is_measured(window, target):
    model = create(window)
    ladder = [replace(FEW, top_p=share) for share in (0.1, 0.3, 0.5, 0.7)]
    found = calibrate(model, [IDS], ladder=ladder, min_length=0, progress=False, **target)
    assert found.density < 1 or target == {"recall": 1.0}
    measured = watched(optimize(model, found, min_length=0))
    assert measured.windows == (window == 32 and "model.layers.0.self_attn" in found.sparse_layers)
    density = 1.0 if measured.density is None else measured.density
    assert found.density == pytest.approx(density, abs=1e-6)


def test_a_narrow_window_does_not_count_towards_the_recall():
    ladder = [replace(FEW, top_p=share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    options: Any = {"ladder": ladder, "min_length": 0, "progress": False}
    found = calibrate(create(window=32), [IDS], recall=0.8, **options)
    # The other layer alone holds as much as was asked for.
    setting = found.sparse_layers["model.layers.1.self_attn"]
    with CaptureAttention() as capture, torch.no_grad():
        create(window=32)(IDS, use_cache=False)
    (call,) = capture.calls
    keep = setting.select(call.query, call.key, is_causal=True, scale=call.scale).keep
    recall = compute_recall(
        call.query, call.key, keep, block_size=FEW.block_size, row_stride=1, scale=call.scale
    )
    assert found.reached == pytest.approx(recall, abs=1e-4)


def test_decoding_is_not_counted():
    model = optimize(create(), FEW, min_length=0, dense_layers=(0,))
    with watch_blocks(model) as found:
        model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert (len(found.records), len(found.sparse), found.left_dense) == (6, 1, 1)
