"""`nn.MultiheadAttention` and `nn.TransformerEncoderLayer`: rewritten, exact, refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.api.capture import captured
from tests.api.models import create, tokens
from tests.passes.graphs import Calls, capture_dynamo
from unisparse_flex import UniSparse, explain, optimize, restore
from unisparse_flex.passes import DenseReason, SparseConfig, rewrite_sdpa
from unisparse_flex.passes.attend.multihead import MULTIHEAD_TARGETS

WIDTH, HEADS, LENGTH, BATCH = 32, 4, 150, 2
ALL = UniSparse(block_size=16, top_p=1.0)
SOME = UniSparse(block_size=16, c_q=4, c_k=4, top_p=0.3)
CONFIG = SparseConfig(selector=ALL)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH)
PADDING = torch.arange(LENGTH)[None] >= torch.tensor([LENGTH, 101])[:, None]
X = tokens(BATCH, LENGTH, WIDTH)
VALID = ~PADDING[..., None]


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)

    def forward(self, x: Tensor, key: Tensor | None = None, **masks: Any) -> Tensor:
        key = x if key is None else key
        return self.attention(x, key, key, need_weights=False, **masks)[0]


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        return self.encoder(x, **masks)


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "bool": {"attn_mask": CAUSAL < 0},
    "per head": {"attn_mask": (CAUSAL < 0).expand(BATCH * HEADS, -1, -1)},
    "padding": {"key_padding_mask": PADDING},
    "additive padding": {"key_padding_mask": torch.zeros(BATCH, LENGTH).masked_fill(PADDING, -1e4)},
    "causal and padding": {
        "attn_mask": CAUSAL < 0,
        "key_padding_mask": PADDING,
        "is_causal": True,
    },
}


@pytest.mark.parametrize("name", MASKS)
def test_multihead_attention_that_keeps_every_block_is_torchs_own(name: str) -> None:
    module = create(SelfAttention, batch_first=True)
    exact = module(X, **MASKS[name])
    output = optimize(copy.deepcopy(module), ALL, min_length=0)(X, **MASKS[name])
    torch.testing.assert_close(output * VALID, exact * VALID, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"batch_first": True}, {"kdim": 24, "vdim": 24}, {"dropout": 0.5}],
    ids=str,
)
def test_every_kind_of_projection_is_torchs_own(options: dict[str, Any]) -> None:
    module = create(SelfAttention, **options)
    query = tokens(LENGTH, BATCH, WIDTH)
    other = tokens(LENGTH + 17, BATCH, options.get("kdim", WIDTH), seed=1)
    if options.get("batch_first"):
        query, other = query.transpose(0, 1), other.transpose(0, 1)
    optimized = optimize(copy.deepcopy(module), ALL, min_length=0)
    assert [call.reason for call in explain(optimized, query, other).calls] == [None]
    torch.testing.assert_close(optimized(query, other), module(query, other), rtol=0, atol=1e-5)


def test_an_unbatched_call_is_torchs_own() -> None:
    module = create(SelfAttention)
    optimized = optimize(copy.deepcopy(module), ALL, min_length=0)
    padding = {"key_padding_mask": PADDING[1]}
    torch.testing.assert_close(optimized(X[0], **padding), module(X[0], **padding))


ENCODER_MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "padding": {"src_key_padding_mask": PADDING},
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", ENCODER_MASKS)
def test_an_encoder_is_rewritten_eager_and_captured(masks: str, norm_first: bool) -> None:
    kwargs = ENCODER_MASKS[masks]
    model = create(Encoder, norm_first=norm_first)
    with torch.no_grad():
        exact = model(X, **kwargs)
        optimized = optimize(copy.deepcopy(model), ALL, min_length=0)
        torch.testing.assert_close(optimized(X, **kwargs) * VALID, exact * VALID)
    run = captured(lambda x: optimized(x, **kwargs), X)
    assert run.marked() == [2]


def test_an_encoder_with_few_blocks_is_not_dense() -> None:
    model = create(Encoder)
    optimized = optimize(copy.deepcopy(model), SOME, min_length=0)
    with torch.no_grad():
        assert (optimized(X) - model(X)).abs().max() > 1e-3
        assert 0 < (explain(optimized, X).density or 0) < 1


def test_restoring_gives_the_fused_layer_back() -> None:
    model = create(Encoder, activation="gelu").encoder
    before = [layer.activation_relu_or_gelu for layer in model.layers]
    restore(optimize(model))
    assert [layer.activation_relu_or_gelu for layer in model.layers] == before == [2, 2]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], DenseReason]] = {
    "weights": ({}, {"need_weights": True}, DenseReason.NEEDS_WEIGHTS),
    "bias": ({"add_bias_kv": True}, {"need_weights": False}, DenseReason.KEYS_OF_ITS_OWN),
    "zero": ({"add_zero_attn": True}, {"need_weights": False}, DenseReason.KEYS_OF_ITS_OWN),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_stays_torchs_own(name: str) -> None:
    options, arguments, reason = REFUSED[name]
    module = nn.MultiheadAttention(WIDTH, HEADS, **options)
    exact = module(X, X, X, **arguments)[0]
    graph = capture_dynamo(Calls(lambda q, k, v: module(q, k, v, **arguments)[0]), X, X, X)
    assert rewrite_sdpa(graph, CONFIG).skipped == {reason: 1}
    optimize(module, SOME, min_length=0)
    assert [call.reason for call in explain(module, X, X, X, **arguments).calls] == [reason]
    assert module(X, X, X, **arguments)[0].equal(exact)


def test_dropout_in_training_is_refused() -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5).train()
    calls = explain(optimize(module, min_length=0), X, X, X, need_weights=False).calls
    assert [call.reason for call in calls] == [DenseReason.DROPOUT]


@pytest.mark.parametrize("fused", [False, True])
def test_calls_in_a_graph_that_was_not_optimized_are_rewritten(fused: bool) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True).eval()
    found: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        found.extend(n.target for n in graph.graph.nodes if n.target in MULTIHEAD_TARGETS.values())
        assert len(rewrite_sdpa(graph, CONFIG).rewritten) == 1
        return graph.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(not fused):
        output = torch.compile(layer, backend=backend, fullgraph=True)(X)
        torch.testing.assert_close(output, layer(X))
    expected = "_transformer_encoder_layer_fwd" if fused else "multi_head_attention_forward"
    assert [target.__name__ for target in found] == [expected]
