"""A range of lengths that the plain model takes, an optimized one takes as one program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.export import Dim, export

from unisparse_flex import Selector, UniSparse, explain, optimize
from unisparse_flex.selectors import DEFAULT_SELECTOR, StreamingLLM

FEW = UniSparse(block_size=32, top_k=2)
SELECTORS: list[Selector] = [FEW, DEFAULT_SELECTOR, StreamingLLM(block_size=32)]

# Strict export takes the function mode that a forward enters and leaves for a side effect.
pytestmark = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Causal(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


class Masked(nn.Module):
    """Grouped heads under a mask that the model computes, of a head_dim of its own."""

    def forward(self, q: Tensor) -> Tensor:
        length = q.shape[2]
        mask = torch.ones((length, length), dtype=torch.bool, device=q.device).tril()
        key = q[:, :1]
        return F.scaled_dot_product_attention(q, key, key[..., :8], attn_mask=mask, enable_gqa=True)


def tokens(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn((1, 2, length, 16), generator=generator)


def sparse_from(model: nn.Module, threshold: int, lengths: list[int]) -> None:
    """Asserts what eager calls of these lengths do: else a comparison would show nothing."""
    found = [{call.decision for call in explain(model, tokens(n)).calls} for n in lengths]
    assert found == [{"sparse" if n >= threshold else "dense"} for n in lengths]


RANGES: list[Any] = [
    Dim("s", min=33, max=640),
    Dim("s", min=2),
    Dim("s"),
    Dim.DYNAMIC,
    Dim.AUTO,
]


@pytest.mark.parametrize("span", RANGES, ids=["bounded", "from 2", "any", "DYNAMIC", "AUTO"])
@pytest.mark.parametrize("module", [Causal, Masked])
def test_a_stated_range_is_one_exported_program(span: Any, module: type[nn.Module]) -> None:
    strict = module is Causal
    model, lengths = optimize(module(), FEW, min_length=200), [33, 199, 200, 640]
    sparse_from(model, 200, lengths)
    shapes = {"q": {2: span}}
    export(module(), (tokens(300),), dynamic_shapes=shapes, strict=strict)
    program = export(model, (tokens(300),), dynamic_shapes=shapes, strict=strict)
    for run in (program.module(), program.run_decompositions().module()):
        for length in lengths:
            torch.testing.assert_close(run(tokens(length)), model(tokens(length)))


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("min_length", [None, 0])
def test_every_selector_takes_a_stated_range(selector: Selector, min_length: int | None) -> None:
    model = optimize(Causal(), selector, min_length=min_length)
    program = export(model, (tokens(300),), dynamic_shapes={"q": {2: Dim("s", min=2, max=4096)}})
    for length in (2, 40, 1000):
        q = tokens(length)
        torch.testing.assert_close(program.module()(q), model(q))


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_range_that_the_plain_model_takes(data: st.DataObject) -> None:
    low = data.draw(st.integers(2, 300), "low")
    high = data.draw(st.integers(low + 1, 700), "high")
    example = data.draw(st.integers(low, high), "example")
    threshold = data.draw(st.integers(0, 700), "threshold")
    selector = data.draw(st.sampled_from(SELECTORS), "selector")
    model = optimize(Causal(), selector, min_length=threshold)
    shapes = {"q": {2: Dim("s", min=low, max=high)}}
    program = export(model, (tokens(example),), dynamic_shapes=shapes).module()
    for length in {low, high, data.draw(st.integers(low, high), "length")}:
        torch.testing.assert_close(program(tokens(length)), model(tokens(length)))


def marked(length: int, grad: bool) -> Tensor:
    q = tokens(length).requires_grad_(grad)
    torch._dynamo.mark_dynamic(q, 2, min=64, max=4096)
    return q


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("module", "backend"),
    [(Causal, "inductor"), (Causal, "aot_eager"), (Masked, "aot_eager"), (Causal, "eager")],
)
def test_a_marked_range_is_one_compiled_program(
    module: type[nn.Module], backend: str, grad: bool
) -> None:
    graphs: list[int] = []

    def counted(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(1)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    model = optimize(module(), FEW, min_length=200)
    run = torch.compile(model, backend=counted, fullgraph=True)
    for length in (300, 64, 199, 200, 640):
        q, same = marked(length, grad), tokens(length).requires_grad_(grad)
        found, want = run(q), model(same)
        torch.testing.assert_close(found, want)
        if grad:
            found.square().sum().backward()
            want.square().sum().backward()
            torch.testing.assert_close(q.grad, same.grad, rtol=1e-4, atol=1e-4)
    assert graphs == [1]


@pytest.mark.parametrize("how", ["dynamic", "marked"])
def test_lengths_without_a_range_are_decided_while_they_are_compiled(how: str) -> None:
    targets: list[Any] = []

    def compiled(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    model = optimize(Causal(), FEW, min_length=200)
    backend = aot_autograd(fw_compiler=compiled)
    run = torch.compile(model, backend=backend, dynamic=True if how == "dynamic" else None)
    for length in (300, 64, 640):
        q = tokens(length)
        if how == "marked":
            torch._dynamo.mark_dynamic(q, 2)
        torch.testing.assert_close(run(q), model(tokens(length)))
    assert torch.ops.unisparse.sdpa_at_run.default not in targets


def test_autocast_is_that_of_the_call_inside_a_range() -> None:
    model = optimize(Causal(), FEW, min_length=0)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, want = run(marked(300, grad=False)), model(tokens(300))
    assert found.dtype is want.dtype is torch.bfloat16
    torch.testing.assert_close(found, want, rtol=0, atol=2e-2)
