"""An optimized model that runs uncompiled: attention is caught, nothing else makes a detour."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from unisparse_flex import UniSparse, attention, explain, optimize
from unisparse_flex.catching import dispatch_key as dispatch
from unisparse_flex.passes import SparseConfig, observe_calls

from .models import FINE, SELECTOR, WIDTH, Attention, create, embeddings, qkv, split_heads
from .reference import assert_computes, assert_is_sparse

X = embeddings(200)


class Depths(nn.Module):
    """Keeps how many function modes each forward of it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(torch._C._len_torch_function_stack())
        return x


class Between(nn.Module):
    """Some module before attention."""

    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self.before, self.attention = before, create(Attention)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.before(x))


class Calling(nn.Module):
    """A module that does what a function says to one tensor."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Causal(nn.Module):
    """Attention of the last rows to all tokens, by torch's own bias."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        heads = split_heads(x)
        bias: Any = causal_lower_right(self.rows, heads.shape[2])
        return F.scaled_dot_product_attention(heads[:, :, -self.rows :], heads, heads, bias)


class Seen(TorchFunctionMode):
    """Keeps the names of the functions that come by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Watching(TorchDispatchMode):
    """Passes everything on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture
def without_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_find_key", lambda: None)
    monkeypatch.setattr(dispatch, "_key", None)


@pytest.fixture
def decisions() -> Iterator[list[bool]]:
    """Whether each marked call was sparse."""
    found: list[bool] = []
    with observe_calls(lambda call, config, selection, reason: found.append(reason is None)):
        yield found


def run(model: nn.Module, x: Tensor = X) -> Any:
    with torch.no_grad():
        return model(x)


def sdpa(x: Tensor) -> Tensor:
    heads = split_heads(x)
    return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)


def optimized(model: nn.Module, selector: UniSparse = SELECTOR, **options: Any) -> Any:
    return optimize(model, selector, min_length=0, **options)


def test_an_eager_forward_enters_no_function_mode() -> None:
    depths = Depths()
    model = optimized(nn.Sequential(depths, create(), depths), dense_layers=())
    assert_is_sparse(run(model), create(), SELECTOR, X)
    assert depths.seen == [0, 0]


def test_a_model_with_torchs_multihead_attention_enters_one() -> None:
    depths = Depths()
    multihead = nn.TransformerEncoderLayer(WIDTH, 4, batch_first=True)
    run(optimized(nn.Sequential(depths, multihead).eval()))
    assert depths.seen == [1]


def test_where_the_key_is_missing_a_forward_enters_a_function_mode(without_key: None) -> None:
    depths = Depths()
    model = optimized(Between(depths))
    assert_is_sparse(run(model), Between(nn.Identity()), SELECTOR, X)
    assert depths.seen == [1]


def test_a_key_that_somebody_else_uses_is_left_to_them() -> None:
    dispatch.set_up_key()
    with pytest.raises(RuntimeError, match="missing or taken"):
        dispatch._Key()


def test_inner_settings_hold_inside_and_the_outer_ones_again_after() -> None:
    model = optimized(create(layers=3))
    optimized(model.layers[1], FINE)
    found: list[UniSparse] = []
    with observe_calls(lambda call, config, *_: found.append(config.selector)):
        run(model)
    assert found == [SELECTOR, FINE, SELECTOR]


def test_a_plain_module_is_caught_inside_a_forward_and_not_after_it(decisions: list[bool]) -> None:
    plain = create(Attention)
    run(optimized(Calling(lambda x: plain(x))))
    run(plain)
    assert decisions == [True]


def test_a_forward_that_raises_leaves_nothing_behind(decisions: list[bool]) -> None:
    def fail(x: Tensor) -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run(optimized(Calling(fail)))
    run(create(Attention))
    assert decisions == []


def test_short_calls_stay_dense_and_are_still_observed(decisions: list[bool]) -> None:
    model, x = optimized(create(Attention)), embeddings(10)
    assert_computes(run(model, x), create(Attention), None, x)
    assert decisions == [False]


def test_attention_by_name_inside_a_forward_keeps_its_own_settings() -> None:
    query, key, value = qkv(200, heads=(2, 2))
    options: Any = {"is_causal": True, "selector": FINE}
    model = optimized(Calling(lambda x: attention(query, key, value, **options)))
    assert run(model).equal(attention(query, key, value, **options))


@pytest.mark.parametrize("with_key", [True, False])
def test_a_lower_right_bias_is_sparse(
    with_key: bool, decisions: list[bool], request: pytest.FixtureRequest
) -> None:
    if not with_key:
        request.getfixturevalue("without_key")
    heads = split_heads(X)
    bias: Any = causal_lower_right(150, 200)
    exact = attention(heads[:, :, -150:], heads, heads, bias, selector=SELECTOR)
    decisions.clear()
    assert run(optimized(Causal(150))).equal(exact)
    assert decisions == [True]


def test_a_bias_made_for_other_lengths_stays_dense(decisions: list[bool]) -> None:
    heads = split_heads(X)
    bias: Any = causal_upper_left(150, 180)
    model = Calling(lambda x: F.scaled_dot_product_attention(heads, heads, heads, bias))
    exact = run(model)
    assert run(optimized(model)).equal(exact)
    assert decisions == []


def test_explain_and_the_eager_call_agree_on_a_bias() -> None:
    model = optimized(Causal(150))
    assert [call.reason for call in explain(model, X).calls] == [None]


def test_a_bias_in_a_plain_model_is_torchs_own() -> None:
    optimized(create(Attention))
    heads = split_heads(X)
    mask: Any = causal_lower_right(150, 200)
    exact = F.scaled_dot_product_attention(
        heads[:, :, -150:], heads, heads, CausalBias._materialize(mask)
    )
    torch.testing.assert_close(run(Causal(150)), exact)


def test_a_function_mode_of_the_caller_sees_what_it_saw() -> None:
    depths = Depths()
    with Seen() as seen:
        output = run(optimized(Between(depths)))
    assert depths.seen == [2]
    assert "scaled_dot_product_attention" not in seen.names
    assert_is_sparse(output, Between(nn.Identity()), SELECTOR, X)


def test_a_dispatch_mode_of_the_caller_changes_nothing() -> None:
    with Watching():
        output = run(optimized(create()))
    assert_is_sparse(output, create(), SELECTOR, X)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_grad_inside_a_forward_are_as_under_a_function_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def mapped(x: Tensor) -> Any:
        outputs = torch.vmap(sdpa)(torch.stack((x, x.flip(1))))
        return outputs, torch.func.grad(lambda t: sdpa(t).square().sum())(x)

    found = run(optimized(Calling(mapped)))
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_key", None)
        expected = run(optimized(Calling(mapped)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(found[0], run(Calling(mapped))[0], atol=1e-2)


def test_a_checkpointed_function_is_sparse_again_in_backward_inside_the_forward(
    decisions: list[bool],
) -> None:
    def step(x: Tensor) -> Tensor:
        x = x.requires_grad_()
        output = checkpoint(sdpa, x, use_reentrant=False)
        return torch.autograd.grad(output.square().sum(), x)[0]

    optimized(Calling(step))(X.clone())
    assert decisions == [True, True]


def test_threads_with_other_models_keep_their_settings() -> None:
    models = {s: optimized(create(), s) for s in (SELECTOR, FINE)}
    barrier, outputs = threading.Barrier(3), {}

    def work(selector: UniSparse | None, model: nn.Module) -> None:
        barrier.wait()
        for _ in range(3):
            outputs[selector] = run(model)

    jobs = [(SELECTOR, models[SELECTOR]), (FINE, models[FINE]), (None, create())]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_is_sparse(outputs[SELECTOR], create(), SELECTOR, X)
    assert_is_sparse(outputs[FINE], create(), FINE, X)
    assert_computes(outputs[None], create(), None, X)


def test_a_stance_of_eager_runs_a_compiled_model_at_the_key() -> None:
    depths = Depths()
    model: Any = torch.compile(optimized(Between(depths)), backend="eager")
    with torch.compiler.set_stance("force_eager"):
        assert_is_sparse(run(model), Between(nn.Identity()), SELECTOR, X)
    assert depths.seen == [0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_layers_compiled_one_by_one_inside_an_eager_root_are_sparse(backend: str) -> None:
    torch._dynamo.reset()
    model = optimized(create())
    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True)
    for _ in range(2):
        assert_is_sparse(run(model), create(), SELECTOR, X)


def test_a_function_that_a_model_compiles_itself_has_the_settings_of_its_caller() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(sdpa, backend="aot_eager", fullgraph=True)
    exact, model = run(Calling(sdpa)), optimized(Calling(compiled))
    sparse = run(optimized(Calling(sdpa)))
    torch.testing.assert_close(run(model), sparse)
    torch.testing.assert_close(compiled(X), exact)
    other = optimized(Calling(compiled), FINE)
    torch.testing.assert_close(run(other), run(optimized(Calling(sdpa), FINE)))
    torch.testing.assert_close(run(model), sparse)


def test_what_is_compiled_while_a_call_is_caught_does_not_see_the_key() -> None:
    torch._dynamo.reset()
    dispatch.set_up_key()
    inside: list[bool] = []
    compiled = torch.compile(sdpa, backend="aot_eager", fullgraph=True)

    def observe(*_: Any) -> None:
        inside.append(dispatch.scope_in_force() is not None)
        assert_computes(compiled(X), Calling(sdpa), None, X)

    with observe_calls(observe):
        run(optimized(Calling(sdpa)))
    assert inside == [False]
    assert_computes(compiled(X), Calling(sdpa), None, X)


def test_settings_of_an_inner_scope_end_with_it() -> None:
    dispatch.set_up_key()
    if dispatch._key is None:
        pytest.skip("this torch has no dispatch key to spare")
    outer = SparseConfig(selector=SELECTOR).encode()
    inner = SparseConfig(selector=FINE).encode()
    with dispatch.catch_attention(outer):
        with dispatch.catch_attention(inner):
            assert dispatch.in_force.config == inner
        assert dispatch.in_force.config == outer
        assert dispatch.scope_in_force() is not None
        with dispatch.leave_attention():
            assert dispatch.scope_in_force() is None
    assert dispatch.in_force.config is None
    assert dispatch.scope_in_force() is None
