import pytest
import torch
import torch.nn.functional as F

from unisparse_flex import UniSparse
from unisparse_flex.evaluation.recall import (
    CaptureAttention,
    compute_recall,
    compute_recall_and_error,
)

BLOCK = 16


def draw(length, heads=4, kv_heads=2):
    torch.manual_seed(length)
    return torch.randn(1, heads, length, 8), torch.randn(1, kv_heads, length, 8)


def keep_all(length, heads):
    blocks = -(-length // BLOCK)
    return torch.ones(1, heads, blocks, blocks, dtype=torch.bool).tril()


def brute_force_recall(query, key, keep, stride):
    """Dense attention in float64, one row at a time."""
    heads, length, head_dim = query.shape[1:]
    group = heads // key.shape[1]
    masses = []
    for head in range(heads):
        for row in range(stride - 1, length, stride):
            keys = key[0, head // group, : row + 1].double()
            weights = (keys @ query[0, head, row].double() / head_dim**0.5).softmax(0)
            kept_row = keep[0, head % keep.shape[1], row // BLOCK]
            masses.append(sum(weights[j] for j in range(row + 1) if kept_row[j // BLOCK]))
    return float(sum(masses) / len(masses))


@pytest.mark.parametrize("length", [64, 100, 129])
@pytest.mark.parametrize("heads", [1, 4])
def test_recall_of_everything_is_one(length, heads):
    query, key = draw(length)
    recall = compute_recall(query, key, keep_all(length, heads), block_size=BLOCK, row_stride=4)
    assert recall == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("length", [64, 100])
@pytest.mark.parametrize("stride", [1, 5, 16])
def test_recall_equals_brute_force(length, stride):
    query, key = draw(length)
    keep = keep_all(length, 4) & (torch.rand(1, 4, -(-length // BLOCK), 1) < 0.5)
    keep |= torch.eye(keep.shape[-1], dtype=torch.bool)
    recall = compute_recall(query, key, keep, block_size=BLOCK, row_stride=stride)
    assert recall == pytest.approx(brute_force_recall(query, key, keep, stride), abs=1e-6)


def test_recall_follows_the_selector():
    query, key = draw(256)
    few = UniSparse(block_size=BLOCK, top_p=0.2).select(query, key, is_causal=True)
    many = UniSparse(block_size=BLOCK, top_p=0.9).select(query, key, is_causal=True)
    recalls = [compute_recall(query, key, s.keep, block_size=BLOCK) for s in (few, many)]
    assert few.density() < many.density()
    assert recalls[0] < recalls[1]


def brute_force_error(query, key, value, keep, stride):
    """Both attentions in float64, one row at a time over the keys that it has."""
    heads, length, head_dim = query.shape[1:]
    group = heads // key.shape[1]
    lost = whole = 0.0
    for head in range(heads):
        for row in range(stride - 1, length, stride):
            logits = key[0, head // group, : row + 1].double() @ query[0, head, row].double()
            values = value[0, head // group, : row + 1].double()
            dense = (logits / head_dim**0.5).softmax(0) @ values
            kept = [j for j in range(row + 1) if keep[0, head, row // BLOCK, j // BLOCK]]
            sparse = (logits[kept] / head_dim**0.5).softmax(0) @ values[kept]
            lost += float((sparse - dense).square().sum())
            whole += float(dense.square().sum())
    return (lost / whole) ** 0.5


@pytest.mark.parametrize("length", [64, 100])
@pytest.mark.parametrize("stride", [1, 5, 16])
def test_recall_and_error_equal_brute_force(length, stride):
    query, key = draw(length)
    value = torch.randn(key.shape)
    keep = keep_all(length, 4) & (torch.rand(1, 4, -(-length // BLOCK), 1) < 0.5)
    keep |= torch.eye(keep.shape[-1], dtype=torch.bool)
    recall, error = compute_recall_and_error(
        query, key, value, keep, block_size=BLOCK, row_stride=stride
    )
    expected = brute_force_error(query, key, value, keep, stride)
    assert expected > 0.05
    assert error == pytest.approx(expected, rel=1e-5)
    assert recall == pytest.approx(brute_force_recall(query, key, keep, stride), abs=1e-6)


@pytest.mark.parametrize("heads", [1, 4])
def test_everything_kept_has_no_error_and_nothing_kept_loses_it_all(heads):
    query, key = draw(100)
    keep = keep_all(100, heads)
    all_of_it, nothing = (
        compute_recall_and_error(query, key, key, kept, block_size=BLOCK, row_stride=4)
        for kept in (keep, torch.zeros_like(keep))
    )
    assert all_of_it == pytest.approx((1.0, 0.0), abs=1e-6)
    assert nothing == pytest.approx((0.0, 1.0), abs=1e-6)


def test_capture_keeps_the_causal_calls_only():
    query, key = draw(32)
    value = torch.randn(key.shape)
    seen: list[None] = []
    with CaptureAttention(on_call=lambda: seen.append(None)) as capture:
        F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=0.5, enable_gqa=True
        )
        F.scaled_dot_product_attention(query[:, :, :1], key, key, enable_gqa=True)
    assert len(seen) == len(capture.calls) == 1
    assert capture.calls[0].query is query
    assert capture.calls[0].key is key
    assert capture.calls[0].value is value
    assert capture.calls[0].scale == 0.5


def test_only_the_layers_that_are_asked_for_are_kept():
    seen: list[None] = []
    queries = [draw(32)[0] + layer for layer in range(4)]
    with CaptureAttention(on_call=lambda: seen.append(None), layers=(3, 1)) as capture:
        for query in queries:
            F.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert len(seen) == capture.count == 4
    assert all(call.query is queries[n] for call, n in zip(capture.calls, (1, 3), strict=True))
    assert len(capture.calls) == 2
