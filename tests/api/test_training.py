"""Gradients on the CPU: those of masked attention over the same blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unisparse_flex import attention, optimize, restore

from .models import SELECTOR, Attention, Transformer, create, embeddings, qkv, tokens
from .reference import ByDefinition, attend, rmse

X = embeddings(150)
# Two float32 computations of the same gradients differ by about 3e-7.
BOUND = 3e-6


class Checkpointed(Transformer):
    """The layers of a `Transformer` behind activation checkpointing."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


Gradients = dict[str, Tensor]


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor = X) -> Gradients:
    """Gradients of every parameter and of the input, of a sum that weighs each output."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    output = run(x)
    (output * tokens(*output.shape, seed=9).to(output.dtype)).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    found["x"] = x.grad
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def defined_gradients(model: nn.Module, selector: Any = SELECTOR) -> Gradients:
    plain = restore(copy.deepcopy(model)).double()
    with ByDefinition(selector):
        return gradients(plain, plain, X.double())


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    errors = {name: rmse(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < BOUND, errors


def optimized(cls: type[nn.Module] = Transformer) -> Any:
    return optimize(create(cls).train(), SELECTOR, min_length=0)


@pytest.mark.parametrize(
    "backend", ["none", "eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_gradients_are_those_of_attention_over_the_same_blocks(backend: str) -> None:
    torch._dynamo.reset()
    model = optimized()
    run = model
    if backend != "none":
        run = torch.compile(model, backend=backend, fullgraph=True)
    found = gradients(model, run)
    assert_same(found, defined_gradients(create()))
    dense = defined_gradients(create(), None)
    assert rmse(found["x"], dense["x"]) > 1e-2


def test_gradients_at_dynamic_lengths_are_those_of_eager() -> None:
    torch._dynamo.reset()
    model = optimized(Attention)
    run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (150, 97, 64):
        x = embeddings(length)
        assert_same(gradients(model, run, x), gradients(model, model, x))


@pytest.mark.parametrize("backend", ["none", "aot_eager"])
def test_checkpointing_changes_no_gradient(backend: str) -> None:
    torch._dynamo.reset()
    model = optimized(Checkpointed)
    run = model if backend == "none" else torch.compile(model, backend=backend, fullgraph=True)
    assert_same(gradients(model, run), defined_gradients(create()))


def test_checkpointing_a_layer_whose_attention_is_optimized_alone() -> None:
    model = create(Checkpointed).train()
    for layer in model.layers:
        optimize(layer.attention, SELECTOR, min_length=0)
    assert_same(gradients(model, model), defined_gradients(create()))


@pytest.mark.parametrize("kind", ["causal", "bool mask", "float mask"])
def test_gradients_of_attention_are_those_of_its_definition(kind: str) -> None:
    causal = torch.ones(150, 150, dtype=torch.bool).tril()
    bias = tokens(4, 150, 150).double().masked_fill(~causal, -torch.inf)
    mask = {"causal": None, "bool mask": causal, "float mask": bias}[kind]
    query, key, value = (t.requires_grad_() for t in qkv(150, batch=2, dtype=torch.float64))
    tensors = query, key, value
    weights = tokens(2, 4, 150, 16, seed=9).double()

    output = attention(
        *tensors, attn_mask=mask, is_causal=mask is None, enable_gqa=True, selector=SELECTOR
    )
    found = torch.autograd.grad((output * weights).sum(), tensors)
    offset = 0 if mask is None else None
    exact = attend(*tensors, selector=SELECTOR, offset=offset, attn_mask=mask)
    expected = torch.autograd.grad((exact * weights).sum(), tensors)
    for gradient, defined in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, defined, rtol=0, atol=1e-9)


def test_a_second_backward_is_allowed_where_sdpa_allows_it() -> None:
    query, key, value = (t.requires_grad_() for t in qkv(64, dtype=torch.float64))
    tensors = query, key, value
    output = attention(*tensors, is_causal=True, enable_gqa=True, selector=SELECTOR)
    first = torch.autograd.grad(output.sum(), tensors, retain_graph=True)
    second = torch.autograd.grad(output.sum(), tensors)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_a_few_steps_of_training_follow_those_of_masked_attention() -> None:
    model, reference = optimized(), create().train()
    losses: dict[str, list[float]] = {"sparse": [], "defined": []}
    target = tokens(*X.shape, seed=4)
    for name, trained in (("sparse", model), ("defined", reference)):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            if name == "defined":
                with ByDefinition(SELECTOR):
                    output = trained(X)
            else:
                output = trained(X)
            loss = (output - target).square().mean()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["sparse"] == pytest.approx(losses["defined"], rel=1e-4)
    assert losses["sparse"][-1] < losses["sparse"][0]
