"""What torch runs apart from a forward is sparse as the forward is.

Bodies of higher-order operators, functions that a model compiles other, and what backward computes
again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from unisparse_flex import UniSparse, explain, optimize, restore
from unisparse_flex.catching.function_mode import SparseAttentionMode

FEW = UniSparse(block_size=32, top_k=2)
Q = torch.randn((1, 2, 128, 16), generator=torch.Generator().manual_seed(0))

# Dynamo makes an instance where it traces an autograd function, and looks at what has no gradient.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def attend(q: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def sparse(q: Tensor) -> Tensor:
    """What `attend` is inside a model with `FEW`."""
    return attend_kept(q, FEW.select(q.detach(), q.detach(), is_causal=True).token_mask())


def attend_kept(q: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q, attn_mask=keep)


def other(q: Tensor) -> Tensor:
    """For the branch that is not taken, with the strides of `attend`."""
    return attend(2 * q)


class Attend(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return attend(q)


class Other(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return other(q)


class Calls(nn.Module):
    """Calls a function in its forward."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(modules)

    def forward(self, q: Tensor) -> Tensor:
        return self.function(q, *self.inner)


def in_checkpoint(q: Tensor) -> Tensor:
    return checkpoint(attend, q, use_reentrant=False)


def in_cond(q: Tensor, *modules: nn.Module) -> Tensor:
    first, second = modules or (attend, other)
    out: Tensor = torch.cond(q.sum() > -1e9, first, second, (q,))
    return out


def in_region(q: Tensor) -> Tensor:
    return region(q)


def in_while_loop(q: Tensor) -> Tensor:
    def again(i: Tensor, q: Tensor) -> Tensor:
        return i < 1

    def body(i: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, attend(q)

    out: Tensor = torch._higher_order_ops.while_loop(again, body, (torch.tensor(0), q))[1]
    return out


def in_map(q: Tensor) -> Tensor:
    def attended(x: Any, *_: Any) -> Any:
        return attend(x)

    out: Tensor = torch._higher_order_ops.map(attended, q[None])[0]
    return out


def in_scan(q: Tensor) -> Tensor:
    def step(carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return attend(carry) + x, carry.clone()

    out: Tensor = scan(step, q, torch.zeros_like(q)[None])[0]
    return out


def in_nested_bodies(q: Tensor) -> Tensor:
    out: Tensor = torch.cond(q.sum() > -1e9, in_while_loop, other, (q,))
    return out


region = torch.compiler.nested_compile_region(attend)
BODIES: dict[str, Callable[[], Calls]] = {
    "checkpoint": lambda: Calls(in_checkpoint),
    "cond": lambda: Calls(in_cond),
    "cond of modules": lambda: Calls(in_cond, Attend(), Other()),
    "nested_compile_region": lambda: Calls(in_region),
    "while_loop": lambda: Calls(in_while_loop),
    "map": lambda: Calls(in_map),
    "scan": lambda: Calls(in_scan),
    "nested bodies": lambda: Calls(in_nested_bodies),
}


@pytest.mark.parametrize("name", BODIES)
def test_attention_in_the_body_of_a_higher_order_operator_is_sparse_eagerly(name: str) -> None:
    plain, model = BODIES[name](), optimize(BODIES[name](), FEW, min_length=0)
    want = sparse(Q)
    assert (want - attend(Q)).abs().max() > 0.1
    torch.testing.assert_close(model(Q), want)
    with torch.device("cpu"):
        torch.testing.assert_close(model(Q), want)
    torch.testing.assert_close(plain(Q), attend(Q))
    torch.testing.assert_close(restore(model)(Q), attend(Q))


@pytest.mark.parametrize(
    ("name", "backend"),
    # Inductor has bodies of branches and of loops.
    [*((name, "eager") for name in BODIES), ("cond", "inductor"), ("scan", "inductor")],
)
def test_attention_in_the_body_of_a_higher_order_operator_is_sparse_compiled(
    name: str, backend: str
) -> None:
    model = optimize(BODIES[name](), FEW, min_length=0)
    with torch.no_grad():
        run = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(run(Q), sparse(Q))
        plain = torch.compile(BODIES[name](), backend="eager", fullgraph=True)
        torch.testing.assert_close(plain(Q), attend(Q))


@pytest.mark.parametrize("name", BODIES)
def test_explain_sees_the_bodies_that_run(name: str) -> None:
    model = optimize(BODIES[name](), FEW, min_length=0)
    assert {call.decision for call in explain(model, Q).calls} == {"sparse"}
    short = optimize(BODIES[name](), FEW, min_length=10**6)
    assert {call.decision for call in explain(short, Q).calls} == {"dense"}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_with_the_default_settings_runs(name: str) -> None:
    model = optimize(BODIES[name]())
    torch.testing.assert_close(model(Q), attend(Q))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(Q), attend(Q))


@pytest.mark.parametrize("name", ["cond", "checkpoint", "nested_compile_region"])
def test_a_body_is_trained_sparse(name: str) -> None:
    want = torch.autograd.grad(sparse(q := Q.clone().requires_grad_()).square().sum(), q)[0]
    model = optimize(BODIES[name](), FEW, min_length=0)
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        q = Q.clone().requires_grad_()
        run(q).square().sum().backward()
        assert q.grad is not None
        torch.testing.assert_close(q.grad, want, rtol=1e-4, atol=1e-4)


def test_submodules_of_an_optimized_model_are_bodies_outside_of_its_forward() -> None:
    model = optimize(nn.ModuleList((Attend(), Other())), FEW, min_length=0)

    def choose(q: Tensor) -> Tensor:
        out: Tensor = torch.cond(q.sum() > -1e9, model[0], model[1], (q,))
        return out

    torch.testing.assert_close(choose(Q), sparse(Q))
    run = torch.compile(choose, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(Q), sparse(Q))


class Projected(nn.Module):
    """Attention over a projection, computed again in backward in some way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.projection = nn.Linear(16, 16)

    def attention(self, x: Tensor) -> Tensor:
        return attend(self.projection(x))

    def forward(self, x: Tensor) -> Any:
        def function(x: Tensor) -> Tensor:
            return attend(self.projection(x))

        match self.how:
            case "method, reentrant" | "method":
                return checkpoint(self.attention, x, use_reentrant="reentrant" in self.how)
            case "function, reentrant" | "function":
                return checkpoint(function, x, use_reentrant="reentrant" in self.how)
            case "nested":
                return checkpoint(
                    lambda x: checkpoint(function, x, use_reentrant=False), x, use_reentrant=False
                )
            case "reversible":
                return Again.apply(x, *self.projection.parameters())
            case "saved":
                with saved_tensors_hooks(lambda t: t, lambda t: (attend(Q), t)[1]):
                    return self.attention(x)
        return self.attention(x)


class Again(torch.autograd.Function):
    """Keeps its inputs alone, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return attend(F.linear(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            out = attend(F.linear(x, weight, bias))
        return torch.autograd.grad(out, (x, weight, bias), grads)


AGAIN = [
    "method, reentrant",
    "method",
    "function, reentrant",
    "function",
    "nested",
    "reversible",
]


def gradients(model: nn.Module, run: Any = None) -> list[Tensor]:
    x = Q.clone().requires_grad_()
    weight = torch.linspace(-1, 1, Q.numel()).view_as(Q)
    ((model if run is None else run)(x) * weight).sum().backward()
    found = [x.grad, *(parameter.grad for parameter in model.parameters())]
    return [grad for grad in found if grad is not None]


def projected(how: str, seed: int = 0) -> Projected:
    torch.manual_seed(seed)
    return Projected(how)


@pytest.mark.parametrize("how", AGAIN)
@pytest.mark.parametrize("where", ["eager", "device context", "compiled"])
def test_what_backward_computes_again_is_sparse_as_it_was(how: str, where: str) -> None:
    want = gradients(optimize(projected("once"), FEW, min_length=0))
    dense = gradients(projected("once"))
    assert all((a - b).norm() > 0.1 * b.norm() for a, b in zip(want, dense, strict=True))
    model = optimize(projected(how), FEW, min_length=0)
    run = torch.compile(model, backend="aot_eager") if where == "compiled" else model
    with torch.device("cpu") if where == "device context" else nullcontext():
        found = gradients(model, run)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    # Of models that are plain, plain again.
    torch.testing.assert_close(gradients(projected(how)), dense, rtol=1e-4, atol=1e-4)


def test_settings_are_those_of_the_forward_and_gone_after_the_backward() -> None:
    model = optimize(projected("function"), FEW, min_length=0)
    want = gradients(optimize(projected("once"), FEW, min_length=0))
    x = Q.clone().requires_grad_()
    out = model(x)
    # Between forward and backward, of both models.
    optimize(model, FEW, min_length=10**6)
    other = optimize(projected("function", seed=1), min_length=10**6)
    other_out = other(x)
    (out * torch.linspace(-1, 1, Q.numel()).view_as(Q)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, want[0], rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(other_out.sum(), x)
    (dense,) = torch.autograd.grad(restore(other)(x).sum(), x)
    torch.testing.assert_close(grad, dense)
    torch.testing.assert_close(attend(Q), Attend()(Q), rtol=0, atol=0)


def test_an_error_in_what_backward_computes_again_leaves_nothing_on() -> None:
    calls: list[int] = []

    def fails_in_backward(q: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise ArithmeticError("in backward")
        return attend(q)

    model = optimize(
        Calls(lambda q: checkpoint(fails_in_backward, q, use_reentrant=True)), FEW, min_length=0
    )
    out = model(Q.clone().requires_grad_())
    with pytest.raises(ArithmeticError):
        out.sum().backward()
    torch.testing.assert_close(attend(Q), Attend()(Q), rtol=0, atol=0)
    torch.testing.assert_close(Attend()(Q), attend_kept(Q, torch.ones(128, 128).tril().bool()))


@pytest.mark.parametrize("plain_first", [False, True])
@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_a_function_that_a_model_compiles_is_sparse_at_once_and_dense_elsewhere(
    plain_first: bool, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    function = torch.compile(attend, backend=backend, fullgraph=True)
    plain, model = Calls(function), optimize(Calls(function), FEW, min_length=0)
    with torch.no_grad():
        for _ in range(2):
            if plain_first:
                torch.testing.assert_close(plain(Q), attend(Q))
            torch.testing.assert_close(model(Q), sparse(Q))
            torch.testing.assert_close(plain(Q), attend(Q))
    assert "stays dense" not in caplog.text


def test_other_models_enter_no_mode_beside_one_that_compiles_its_own_attention() -> None:
    function = torch.compile(attend, backend="eager")
    optimize(Calls(function), FEW, min_length=0)(Q)
    depths: list[int] = []

    def watched(q: Tensor) -> Tensor:
        depths.append(torch._C._len_torch_function_stack())
        return attend(q)

    torch.testing.assert_close(optimize(Calls(watched), FEW, min_length=0)(Q), sparse(Q))
    assert depths == [0]


def test_a_compiled_function_is_compiled_once_inside_a_model_and_fails_cleanly() -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(1)
        return graph.forward

    def raising(q: Tensor) -> Tensor:
        raise ArithmeticError("inside")

    function = torch.compile(attend, backend=backend)
    model = optimize(Calls(function), FEW, min_length=0)
    for _ in range(3):
        torch.testing.assert_close(model(Q), sparse(Q))
    assert compiled == [1]
    failing = optimize(Calls(torch.compile(raising, backend="eager")), FEW, min_length=0)
    with pytest.raises(ArithmeticError):
        failing(Q)
    torch.testing.assert_close(model(Q), sparse(Q))
    torch.testing.assert_close(Attend()(Q), attend_kept(Q, torch.ones(128, 128).tril().bool()))


class AfterProduct(Attend):
    """Attention after a product that Inductor leaves to a library."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16, bias=False).requires_grad_(False)

    def forward(self, q: Tensor) -> Tensor:
        return super().forward(self.project(q))


def test_kernels_of_a_layer_compiled_by_itself_run_without_the_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = AfterProduct()
    expected = sparse(layer.project(Q))
    model = optimize(nn.Sequential(layer), FEW, min_length=0)
    layer.compile()
    torch.testing.assert_close(model(Q), expected)

    caught = []
    catch = SparseAttentionMode.__torch_function__

    def watched(self: SparseAttentionMode, *args: Any, **kwargs: Any) -> Any:
        caught.append(args[0])
        return catch(self, *args, **kwargs)

    monkeypatch.setattr(SparseAttentionMode, "__torch_function__", watched)
    torch.testing.assert_close(model(Q), expected)
    assert torch.mm not in caught
    assert set(caught) <= {torch._C._set_grad_enabled}
    assert torch._C._len_torch_function_stack() == 0
