"""Kinds of attention calls in one Inductor graph, each with what stands around it in models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

import unisparse_flex
from unisparse_flex import UniSparse, optimize

from .models import HEAD_DIM, HEADS, SELECTOR, WIDTH, create, qkv, split_heads, tokens
from .reference import ByDefinition, attend, rmse

LENGTH = 203
OWN = UniSparse(block_size=16, c_q=4, c_k=4, top_k=2)
BFLOAT16_ERROR = 2.0**-7


class Calls(nn.Module):
    """One attention call of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Linear(WIDTH, 3 * WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x, query, key, value = (inputs[n] for n in ("x", "query", "key", "value"))
        bool_mask, float_mask = inputs["bool_mask"], inputs["float_mask"]
        sdpa = F.scaled_dot_product_attention
        one, two, three = (split_heads(part) for part in self.fused(x).chunk(3, dim=-1))
        views = sdpa(one, two, three, is_causal=True)
        return {
            "views of one output": views,
            "pointwise op behind": views.transpose(1, 2).flatten(2) * self.gate(x).sigmoid(),
            "grouped heads": sdpa(query, key, value, is_causal=True, enable_gqa=True),
            "not causal": sdpa(query, key, value, enable_gqa=True, scale=0.4),
            "bfloat16": sdpa(
                query.bfloat16(),
                key.bfloat16(),
                value.bfloat16(),
                is_causal=True,
                enable_gqa=True,
            ),
            "bool mask": sdpa(query, key, value, attn_mask=bool_mask, enable_gqa=True),
            "float mask": sdpa(query, key, value, attn_mask=float_mask, enable_gqa=True),
        }


class FewerQueries(nn.Module):
    """`unisparse_flex.attention` in a user's own code."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Any) -> Tensor:
        out = unisparse_flex.attention(
            query, key, value, attn_mask=bias, enable_gqa=True, selector=OWN
        )
        return out + query


KINDS = (
    "views of one output",
    "pointwise op behind",
    "grouped heads",
    "not causal",
    "bfloat16",
    "bool mask",
    "float mask",
)


def create_inputs() -> dict[str, Tensor]:
    query, key, value = qkv(LENGTH, heads=(HEADS, 2), batch=2)
    generator = torch.Generator().manual_seed(5)
    padding = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    padding[1, ..., -40:] = False
    return {
        "x": tokens(2, LENGTH, WIDTH),
        "query": query,
        "key": key,
        "value": value,
        "bool_mask": padding & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(),
        "float_mask": torch.randn(HEADS, LENGTH, LENGTH, generator=generator),
    }


def define(model: nn.Module, selector: Any) -> dict[str, Tensor]:
    with torch.no_grad(), ByDefinition(selector):
        return model(create_inputs())


@pytest.fixture(scope="module")
def results() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The compiled module's outputs, those of sparse and those of dense attention."""
    torch._dynamo.reset()
    model = create(Calls)
    sparse, dense = define(model, SELECTOR), define(model, None)
    optimize(model, SELECTOR, min_length=0)
    with torch.no_grad():
        return torch.compile(model, fullgraph=True)(create_inputs()), sparse, dense


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_call_compiles_and_is_right(results: Any, kind: str) -> None:
    output, sparse, dense = (outputs[kind] for outputs in results)
    bound = BFLOAT16_ERROR if kind == "bfloat16" else 1e-6
    assert output.dtype == sparse.dtype
    assert rmse(output, sparse) <= bound
    assert rmse(output, dense) > 1e-2


@pytest.mark.slow
def test_attention_in_code_of_a_user_compiles_and_is_sparse() -> None:
    query, key, value = qkv(150, LENGTH, batch=2)
    with torch.no_grad():
        output = torch.compile(FewerQueries(), fullgraph=True)(
            query, key, value, causal_lower_right(150, LENGTH)
        )
    offset = LENGTH - 150
    exact = attend(query, key, value, selector=OWN, offset=offset) + query
    assert rmse(output, exact) < 1e-6
    assert rmse(output, attend(query, key, value, offset=offset) + query) > 1e-2


@pytest.mark.parametrize("dynamic", [False, True])
def test_attention_in_code_of_a_user_is_sparse_behind_any_backend(dynamic: bool) -> None:
    run = torch.compile(FewerQueries(), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for q_len, kv_len in ((150, LENGTH), (99, 200), (64, 64)):
        query, key, value = qkv(q_len, kv_len)
        exact = attend(query, key, value, selector=OWN, offset=kv_len - q_len) + query
        output = run(query, key, value, causal_lower_right(q_len, kv_len))
        assert rmse(output, exact) < 1e-6


@pytest.mark.parametrize(
    "method",
    [
        lambda x: x.unflatten(-1, (-1, HEAD_DIM)),
        lambda x: torch.unflatten(x, -1, (-1, HEAD_DIM)),
        lambda x: x.split(HEAD_DIM, dim=-1)[0],
        lambda x: x.norm(dim=-1),
        lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1).reshape(2, -1, WIDTH),
    ],
    ids=["unflatten", "torch.unflatten", "split", "norm", "expand"],
)
def test_tensor_methods_compile_inside_an_optimized_model(method: Callable[..., Any]) -> None:
    class Uses(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return method(x)

    torch._dynamo.reset()
    x = tokens(2, 64, WIDTH)
    compiled = torch.compile(optimize(Uses(), SELECTOR), backend="eager", fullgraph=True)
    assert compiled(x).equal(method(x))
