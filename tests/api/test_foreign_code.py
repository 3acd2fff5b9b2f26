"""What somebody else does to torch and to a model's classes keeps its effect, once."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unisparse_flex import UniSparse, explain, optimize, restore
from unisparse_flex.passes import DenseReason

from .models import Attention, create, embeddings

ROOT = Path(__file__).parents[2]
FEW = UniSparse(block_size=32, top_k=2)
SDPA: Callable[..., Tensor] = F.scaled_dot_product_attention
OPERATORS = [
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
]


class Call(nn.Module):
    """One causal attention call, through whatever the name stands for when it runs."""

    scale: Any = None
    function: Any = None

    def forward(self, q: Tensor) -> Tensor:
        function = F.scaled_dot_product_attention if self.function is None else self.function
        return function(q, q, q, is_causal=True, scale=self.scale)


def twice(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
    return SDPA(2 * query, key, value, *rest, **options)


def twice_by_name(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return SDPA(2 * query, key, value, **options)


def tokens_first(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return SDPA(2 * q, k, v, **options).transpose(1, 2)


@pytest.fixture(params=[twice, twice_by_name, tokens_first])
def patch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(F, "scaled_dot_product_attention", request.param)
    yield request.param
    torch._dynamo.reset()


def tokens(patch: Any = None) -> Tensor:
    shape = (1, 256, 2, 16) if patch is tokens_first else (1, 2, 256, 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def expected(patch: Any, q: Tensor) -> Tensor:
    """The patch's computation, written out, sparse."""
    q = q.transpose(1, 2) if patch is tokens_first else q
    keep = FEW.select(2 * q, q, is_causal=True).token_mask()
    out = SDPA(2 * q, q, q, attn_mask=keep)
    return out.transpose(1, 2) if patch is tokens_first else out


def test_a_patched_attention_runs_once_where_the_call_stays_dense(patch: Any) -> None:
    q = tokens(patch)
    torch.testing.assert_close(optimize(Call())(q), Call()(q), rtol=0, atol=0)
    short = optimize(Call(), FEW, min_length=10**6)
    torch.testing.assert_close(short(q), Call()(q), rtol=0, atol=0)


def test_a_patched_attention_is_sparse_eagerly_under_a_mode_and_compiled(patch: Any) -> None:
    q = tokens(patch)
    model = optimize(Call(), FEW, min_length=0)
    want = expected(patch, q)
    assert (want - Call()(q)).abs().max() > 0.1
    torch.testing.assert_close(model(q), want)
    with torch.device("cpu"):
        torch.testing.assert_close(model(q), want)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(q), want)
    assert [call.decision for call in explain(model, q).calls] == ["sparse"]


def test_a_patched_attention_under_a_mode_or_compiled_runs_once_where_it_is_dense(
    patch: Any,
) -> None:
    q = tokens(patch)
    model, want = optimize(Call(), FEW, min_length=10**6), Call()(q)
    with torch.device("cpu"):
        torch.testing.assert_close(model(q), want, rtol=0, atol=0)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(q), want)


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_the_aten_operator_is_sparse_eagerly_and_compiled(operator: Any) -> None:
    q = tokens()
    model = optimize(Call(), FEW, min_length=0)
    model.function = operator
    want = SDPA(q, q, q, attn_mask=FEW.select(q, q, is_causal=True).token_mask())
    torch.testing.assert_close(model(q), want)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), want)


@pytest.mark.parametrize("scale", [torch.tensor(0.3), np.float32(0.3), np.float64(0.3), 1])
def test_a_scale_of_any_kind_of_number_that_torch_takes(scale: Any) -> None:
    q = tokens()
    model = optimize(Call(), FEW, min_length=0)
    model.scale = scale
    keep = FEW.select(q, q, is_causal=True, scale=float(scale)).token_mask()
    want = SDPA(q, q, q, attn_mask=keep, scale=float(scale))
    torch.testing.assert_close(model(q), want)
    with torch.device("cpu"):
        torch.testing.assert_close(model(q), want)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), want)


@pytest.mark.parametrize("shape", [(), (5,), (5, 8), (4, 5, 8)])
def test_what_is_no_attention_call_meets_what_torch_says_of_it(shape: tuple[int, ...]) -> None:
    q, model = torch.randn(shape), optimize(Call(), FEW, min_length=0)
    if len(shape) > 1:
        torch.testing.assert_close(model(q), Call()(q))
        return
    with pytest.raises(RuntimeError) as of_torch:
        Call()(q)
    for run in (model, lambda q: explain(model, q)):
        with pytest.raises(RuntimeError) as ours:
            run(q)
        assert str(ours.value) == str(of_torch.value)


class Registry(nn.Module):
    """Keeps its subclasses by kind, which each must give."""

    kinds: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, kind: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kinds[kind] = cls


class Meta(type):
    """Keeps every class that is made with it by name."""

    made: ClassVar[list[type]] = []

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)
        Meta.made.append(cls)


class OfKind(Registry, kind="attention"):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


class OfMeta(Attention, metaclass=Meta):
    """Made by a metaclass of its own."""


@pytest.mark.parametrize("cls", [OfKind, OfMeta])
def test_hooks_of_the_users_classes_do_not_run(cls: type[nn.Module]) -> None:
    before = dict(Registry.kinds), list(Meta.made)
    model = optimize(create(cls), FEW, min_length=0)
    assert isinstance(model, cls)
    assert [call.decision for call in explain(model, embeddings(256)).calls] == ["sparse"]
    assert (Registry.kinds, Meta.made) == before
    restore(model)
    assert type(model) is cls
    assert (Registry.kinds, Meta.made) == before


class Wrapping(nn.Module):
    """Wraps the forward of every class; only the outermost wrapper does anything."""

    outermost: int = 0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        inner = cls.forward

        @functools.wraps(inner)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.outermost += type(self).forward is wrapped
            return inner(self, *args, **kwargs)

        cls.forward = wrapped


class Wrapped(Wrapping):
    def forward(self, q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


class WrappedTwice(Wrapped):
    def forward(self, q: Tensor) -> Tensor:
        return super().forward(q)


@pytest.mark.parametrize("cls", [Wrapped, WrappedTwice])
def test_a_forward_that_a_class_hook_wrapped_stays_wrapped_outermost(cls: type[Wrapping]) -> None:
    q = tokens()
    model = optimize(nn.Sequential(cls()), FEW, min_length=0)
    want = SDPA(q, q, q, attn_mask=FEW.select(q, q, is_causal=True).token_mask())
    torch.testing.assert_close(model(q), want)
    assert model[0].outermost == 1
    restore(model)
    torch.testing.assert_close(model(q), SDPA(q, q, q, is_causal=True))
    assert model[0].outermost == 2


def test_a_class_derived_from_an_optimized_one_runs_its_hooks() -> None:
    model = optimize(create(OfKind), FEW, min_length=0)
    try:

        class Derived(type(model), kind="derived"):  # type: ignore[misc, call-arg]
            pass

        assert Registry.kinds["derived"] is Derived
    finally:
        Registry.kinds.pop("derived", None)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Attention()])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](x)


class Mixed(nn.Module):
    """Functions of torch that are written in Python, `nn.MultiheadAttention`'s among them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(F.softmax(x, dim=-1), [32])
        x = self.attention(x, x, x, need_weights=False)[0]
        first, second = torch.stack(x.split(16, dim=-1)).norm(dim=-1)
        return torch.einsum("bs,bs->b", first, second)


PYTHON_FUNCTIONS = [
    (F, "multi_head_attention_forward"),
    (F, "softmax"),
    (F, "layer_norm"),
    (torch.Tensor, "split"),
    (torch.Tensor, "norm"),
    (torch.functional, "einsum"),
]


@pytest.mark.parametrize(("owner", "name"), PYTHON_FUNCTIONS, ids=lambda part: str(part)[-24:])
@pytest.mark.parametrize("selector", [None, UniSparse(block_size=32, top_p=1.0, c_q=8, c_k=8)])
def test_a_function_of_torch_that_somebody_patched_runs_once(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, selector: UniSparse | None
) -> None:
    own, calls = getattr(owner, name), []

    @functools.wraps(own)
    def patched(*args: Any, **options: Any) -> Any:
        calls.append(name)
        # What a second run would change.
        first, *rest = args
        return own(2 * first + 1 if isinstance(first, Tensor) else first, *rest, **options)

    x = torch.randn(1, 256, 32, generator=torch.Generator().manual_seed(0))
    model = create(Mixed).train()
    monkeypatch.setattr(owner, name, patched)
    expected = model(x)
    count = len(calls)
    optimize(model, selector, min_length=None if selector is None else 0)
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 2 * count
    decided = [call.decision for call in explain(model, x).calls]
    assert decided == ["dense" if selector is None else "sparse"]
    restore(model)
    assert [call.reason for call in explain(model, x).calls] == [DenseReason.NOT_OPTIMIZED]
    assert len(calls) == 4 * count


PATCHED_BEFORE = """
import os, sys, torch, torch.nn.functional as F
own = F.multi_head_attention_forward
# In a file of the user's, or of a package beside torch.
beside = os.path.dirname(torch.__file__) + "vision/patch.py"
name = {"here": "patch.py", "beside": beside}[sys.argv[1]]
patch = "lambda query, *rest, **more: own(2 * query, *rest, **more)"
F.multi_head_attention_forward = eval(compile(patch, name, "eval"))
from tests.api.models import create
from tests.api.test_foreign_code import Mixed
from unisparse_flex import UniSparse, explain, optimize
x = torch.randn(1, 256, 32)
model = create(Mixed).train()
expected = model(x)
for selector in (None, UniSparse(block_size=32, top_p=1.0, c_q=8, c_k=8)):
    optimize(model, selector, min_length=None if selector is None else 0)
    torch.testing.assert_close(model(x), expected)
    print(*(call.decision for call in explain(model, x).calls))
"""


@pytest.mark.parametrize("place", ["here", "beside"])
def test_a_function_that_was_patched_before_the_import_runs_once(place: str) -> None:
    command = [sys.executable, "-c", PATCHED_BEFORE, place]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["dense", "sparse"]


def assign_itself(module: nn.Module) -> None:
    module.forward = module.forward


def assign_closure(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda *args, **options: before(*args, **options)


def assign_partial(module: nn.Module) -> None:
    module._old_forward = module.forward  # type: ignore[assignment]
    module.forward = functools.partial(call_old, module)


def call_old(module: Any, *args: Any, **options: Any) -> Tensor:
    return module._old_forward(*args, **options)


def assign_hook(module: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))


ASSIGNMENTS = [assign_itself, assign_closure, assign_partial, assign_hook]


def decisions(model: nn.Module) -> list[str]:
    return [call.decision for call in explain(model, embeddings(256)).calls]


@pytest.fixture(params=ASSIGNMENTS)
def assigned(request: pytest.FixtureRequest) -> Pair:
    """A model to whose every forward something was assigned."""
    model = create(Pair)
    for module in [*model.modules()]:
        request.param(module)
    return model


# Of Dynamo, where it resumes after what it cannot trace of accelerate's hooks.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    ("assigned", "compiled"),
    [*((assign, False) for assign in ASSIGNMENTS), (assign_itself, True), (assign_hook, True)],
    indirect=["assigned"],
)
def test_a_forward_assigned_before_is_sparse(assigned: Pair, compiled: bool) -> None:
    x, sparse = embeddings(256), optimize(create(Pair), FEW, min_length=0)
    dense = create(Pair)(x)
    forwards = [module.forward for module in assigned.modules()]
    state = [*assigned.state_dict()]
    optimize(assigned, FEW, min_length=0)
    run: Any = torch.compile(assigned) if compiled else assigned
    torch.testing.assert_close(run(x), sparse(x))
    if not compiled:
        assert decisions(assigned) == ["sparse"]
        assert decisions(copy.deepcopy(assigned)) == ["sparse"]
    assert [*assigned.state_dict()] == state
    optimize(assigned, FEW, min_length=10**6)
    torch.testing.assert_close(run(x), dense)
    restore(assigned)
    assert [module.forward for module in assigned.modules()] == forwards
    torch.testing.assert_close(run(x), dense)


def test_settings_of_a_part_hold_in_a_forward_assigned_before(assigned: Pair) -> None:
    optimize(assigned, FEW, min_length=0)
    optimize(assigned.inner[0], FEW, min_length=10**6)
    assert decisions(assigned) == ["dense"]


def test_a_hook_taken_off_afterwards_leaves_the_forward_sparse() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = create(Pair)
    for module in [*model.modules()]:
        assign_hook(module)
    optimize(model, FEW, min_length=0)
    hooks.remove_hook_from_module(model, recurse=True)
    assert decisions(model) == ["sparse"]
    assert not hasattr(model, "_old_forward")
    restore(model)
    assert [call.reason for call in explain(model, embeddings(256)).calls] == [
        DenseReason.NOT_OPTIMIZED
    ]


class Scriptable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 16), Inner())

    def forward(self, q: Tensor) -> Tensor:
        return self.inner(q)


class Inner(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_scripting_an_optimized_model_is_refused_and_a_restored_one_is_plain() -> None:
    model, q = optimize(Scriptable(), FEW, min_length=0), tokens()
    for part, name in ((model, "Scriptable"), (model.inner, "Inner"), (model.inner[1], "Inner")):
        with pytest.raises(TypeError, match=rf"got an optimized {name}; call restore\(model\)"):
            torch.jit.script(part)
    # What holds an optimized model is refused too.
    with pytest.raises(TypeError, match="got an optimized Scriptable"):
        torch.jit.script(nn.Sequential(model))
    restore(model)
    torch.testing.assert_close(torch.jit.script(model)(q), model(q))
