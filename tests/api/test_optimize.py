"""`optimize` and `restore` change what attention does, and nothing else about a model."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unisparse_flex import (
    UniSparse,
    explain,
    is_optimized,
    optimize,
    restore,
    temporarily_optimize,
)
from unisparse_flex.catching import dispatch_key as dispatch
from unisparse_flex.passes import DenseReason

from .capture import captured, compiles
from .models import FINE, SELECTOR, Attention, Layer, Transformer, create, embeddings
from .reference import assert_computes, assert_is_sparse, defined_output, rmse

X = embeddings(200)


def sparse_model(**options: Any) -> Any:
    return optimize(create(**options), SELECTOR, min_length=0)


def output(model: Any, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_the_model_is_changed_in_place_and_returned() -> None:
    model = create()
    assert optimize(model, SELECTOR, min_length=0) is model
    assert_is_sparse(output(model), create(), SELECTOR, X)


def test_attention_elsewhere_is_left_alone() -> None:
    sparse_model()
    assert_computes(output(create()), create(), None, X)
    assert captured(create(), X).marked() == [0]


def test_what_python_sees_of_the_model_stays() -> None:
    model, original = sparse_model(), create()
    assert isinstance(model, Transformer)
    assert isinstance(model.layers[0], Layer)
    for changed, plain in zip(model.modules(), original.modules(), strict=True):
        assert type(changed).__name__ == type(plain).__name__
        assert type(changed).__qualname__ == type(plain).__qualname__
        assert type(changed).__module__ == type(plain).__module__
        assert inspect.signature(changed.forward) == inspect.signature(plain.forward)
    assert repr(model) == repr(original)


def test_parameters_and_state_dict_stay() -> None:
    model, original = sparse_model(), create()
    assert list(model.state_dict()) == list(original.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in original.named_parameters()]
    model.load_state_dict(original.state_dict(), strict=True)
    original.load_state_dict(model.state_dict(), strict=True)


def test_a_module_made_by_the_class_of_an_optimized_one_is_plain() -> None:
    model = create(type(sparse_model()))
    assert not is_optimized(model)
    assert_computes(output(model), create(), None, X)
    assert_is_sparse(output(optimize(model, SELECTOR, min_length=0)), create(), SELECTOR, X)
    assert type(restore(model)) is Transformer


def test_hooks_registered_before_and_after_run_once() -> None:
    seen: list[str] = []
    model = create()
    model.layers[0].register_forward_hook(lambda *_: seen.append("before"))
    optimize(model, SELECTOR, min_length=0)
    model.layers[0].register_forward_pre_hook(lambda *_: seen.append("after"))
    output(model)
    assert seen == ["after", "before"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, through_pickle, through_a_file])
def test_copies_are_optimized_alike(duplicate: Callable[[Any], Any]) -> None:
    model = sparse_model()
    other = duplicate(model)
    assert is_optimized(other)
    assert isinstance(other, Transformer)
    assert output(other).equal(output(model))


def test_a_deep_copy_is_restored_alone() -> None:
    model = sparse_model()
    other = restore(copy.deepcopy(model))
    assert is_optimized(model)
    assert_is_sparse(output(model), create(), SELECTOR, X)
    assert_computes(output(other), create(), None, X)


def test_optimizing_again_replaces_the_settings() -> None:
    model = sparse_model()
    types = [type(module) for module in model.modules()]
    optimize(model, FINE, min_length=0)
    assert [type(module) for module in model.modules()] == types
    assert_is_sparse(output(model), create(), FINE, X)


def test_optimizing_again_without_dense_layers_makes_all_sparse() -> None:
    model = optimize(create(), SELECTOR, min_length=0, dense_layers=(0, 1))
    optimize(model, SELECTOR, min_length=0)
    assert_is_sparse(output(model), create(), SELECTOR, X)


def test_a_submodule_optimized_afterwards_has_its_own_settings() -> None:
    model = sparse_model()
    optimize(model.layers[1], FINE, min_length=0)
    (configs,) = captured(model, X).configs()
    assert [config.selector for config in configs] == [SELECTOR, FINE]


def test_a_submodule_alone_can_be_optimized_and_run() -> None:
    model = create()
    optimize(model.layers[1], SELECTOR, min_length=0)
    assert not is_optimized(model)
    reasons = [call.reason for call in explain(model, X).calls]
    assert reasons == [DenseReason.NOT_OPTIMIZED, None]
    layer = sparse_model().layers[0]
    assert_is_sparse(output(layer), create().layers[0], SELECTOR, X)


def test_restore_gives_types_and_dense_attention_back() -> None:
    model, original = sparse_model(), create()
    assert restore(model) is model
    assert not is_optimized(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in original.modules()]
    assert output(model).equal(output(original))


def test_restoring_twice_or_for_nothing_changes_nothing() -> None:
    model = restore(restore(sparse_model()))
    assert type(model) is Transformer
    assert type(restore(create())) is Transformer


PART = "restore must be given the whole model .* a part of an optimized Transformer"


@pytest.mark.parametrize("duplicate", [lambda m: m, copy.deepcopy, through_pickle])
@pytest.mark.parametrize("name", ["layers", "layers.1", "layers.1.attention"])
def test_a_restored_part_says_that_the_whole_still_applies(name: str, duplicate: Any) -> None:
    model = duplicate(sparse_model())
    part, expected = model.get_submodule(name), output(model)
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"{PART}.*restore the Transformer, or"):
            restore(part)
        assert not is_optimized(part)
        assert output(model).equal(expected)
    restore(model)
    assert output(model).equal(output(create()))


def test_a_restored_part_of_what_is_dense_is_dense() -> None:
    model = optimize(create(), SELECTOR, min_length=0, dense_layers=(0, 1))
    for layer in model.layers:
        optimize(layer.attention, SELECTOR, min_length=0)
    restore(model.layers[0].attention)
    reasons = [call.reason for call in explain(model, X).calls]
    assert reasons == [DenseReason.EXCLUDED, None]


def test_a_part_that_left_the_model_is_restored_alone() -> None:
    model = sparse_model()
    layer = model.layers.pop(0)
    restore(layer)
    restore(copy.deepcopy(model.layers[0]))
    assert_computes(output(layer), create().layers[0], None, X)


def sharing(**options: Any) -> tuple[Any, Any]:
    """Two models, the first one optimized, of which the second has the other's first layer."""
    model, other = create(), create(seed=1)
    other.layers[0] = model.layers[0]
    return optimize(model, SELECTOR, min_length=0, **options), other


def test_a_module_that_two_models_share_has_one_setting() -> None:
    model, other = sharing()
    assert not is_optimized(other)
    assert [c.reason for c in explain(other, X).calls] == [None, DenseReason.NOT_OPTIMIZED]
    expected = output(model)
    # The model that has the module keeps it sparse, so there is nothing to say.
    restore(other)
    assert {c.reason for c in explain(other, X).calls} == {DenseReason.NOT_OPTIMIZED}
    assert output(model).equal(expected)


def test_restoring_a_shared_module_says_what_changes_elsewhere() -> None:
    model, other = sharing(dense_layers=(0,))
    assert [c.reason for c in explain(model, X).calls] == [DenseReason.EXCLUDED, None]
    with pytest.warns(UserWarning, match="shares with an optimized Transformer.*again"):
        restore(other)
    assert [c.reason for c in explain(model, X).calls] == [None, None]


@pytest.mark.parametrize("value", [object(), None, torch.nn.Linear])
def test_what_is_no_module_cannot_be_restored(value: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, optimized or not"):
        restore(value)


def test_a_restored_model_can_be_optimized_again() -> None:
    model = optimize(restore(sparse_model()), FINE, min_length=0)
    assert_is_sparse(output(model), create(), FINE, X)


def test_restoring_a_compiled_model_makes_it_dense() -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(sparse_model(layers=1), backend="aot_eager")
    assert is_optimized(compiled)
    assert_is_sparse(output(compiled), create(layers=1), SELECTOR, X)
    assert restore(compiled) is compiled
    assert not is_optimized(compiled)
    assert_computes(output(compiled), create(layers=1), None, X)


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="aot_eager", fullgraph=True)
    return model


def layers_compiled_in_place(model: Any) -> Any:
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    return model


def wrapped(model: Any) -> Any:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("compile_", [compiled_in_place, layers_compiled_in_place, wrapped])
def test_a_compiled_model_follows_the_settings_that_it_is_given(compile_: Any) -> None:
    torch._dynamo.reset()
    model = compile_(create())
    assert_computes(output(model), create(), None, X)
    for selector in (SELECTOR, FINE, SELECTOR):
        assert optimize(model, selector, min_length=0) is model
        assert is_optimized(model)
        assert_is_sparse(output(model), create(), selector, X)
        assert restore(model) is model
        assert_computes(output(model), create(), None, X)
        with temporarily_optimize(model, FINE, min_length=0) as inside:
            assert inside is model
            assert_is_sparse(output(model), create(), FINE, X)
        assert_computes(output(model), create(), None, X)


def test_settings_that_come_back_compile_nothing_anew() -> None:
    torch._dynamo.reset()
    model = compiled_in_place(create())
    for selector in (SELECTOR, FINE):
        output(optimize(model, selector, min_length=0))
    with compiles(at_most=0):
        for selector in (SELECTOR, FINE):
            output(optimize(model, selector, min_length=0))


def test_dense_layers_of_a_compiled_model_are_counted_as_of_a_plain_one() -> None:
    torch._dynamo.reset()
    model = wrapped(create())
    optimize(model, SELECTOR, min_length=0, dense_layers=(0,))
    assert [call.decision for call in explain(model, X).calls] == ["dense", "sparse"]


def test_layers_compiled_one_by_one_follow_the_settings() -> None:
    torch._dynamo.reset()
    model = create()
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_computes(output(model), create(), None, X)
    optimize(model, SELECTOR, min_length=0)
    assert_is_sparse(output(model), create(), SELECTOR, X)


@pytest.mark.parametrize(
    ("dense_layers", "expected"),
    [((), [1, 1, 1]), ((0,), [0, 1, 1]), ((-1,), [1, 1, 0]), ([0, -2, 1], [0, 0, 1])],
)
def test_dense_layers_stay_dense(dense_layers: Any, expected: list[int]) -> None:
    model = optimize(create(layers=3), SELECTOR, min_length=0, dense_layers=dense_layers)
    calls = explain(model, X).calls
    assert [int(call.decision == "sparse") for call in calls] == expected
    assert {call.reason for call in calls if call.decision == "dense"} <= {DenseReason.EXCLUDED}


def test_all_layers_excluded_is_the_dense_model() -> None:
    model = optimize(create(), SELECTOR, min_length=0, dense_layers=range(2))
    assert output(model).equal(output(create()))


def test_short_prompts_stay_dense_by_default() -> None:
    model = optimize(create())
    assert [call.reason for call in explain(model, X).calls] == [DenseReason.SLOWER] * 2
    assert output(model).equal(output(create()))
    long = embeddings(8192)
    assert explain(optimize(create(Attention)), long[:, :200]).dense
    assert explain(optimize(create(Attention)), long).sparse


def test_fewer_queries_than_a_block_stay_dense() -> None:
    model = optimize(create(Attention), UniSparse(block_size=64), min_length=0)
    short = explain(model, embeddings(63))
    assert [c.reason for c in short.calls] == [DenseReason.FEW_QUERIES]
    assert short.next_step == (
        "a longer prompt: one that is shorter than a block (64 tokens) stays dense"
    )
    assert [c.reason for c in explain(model, embeddings(64)).calls] == [None]


def test_inference_mode_computes_the_same() -> None:
    model = sparse_model()
    with torch.inference_mode():
        assert model(X).equal(output(model))


def test_autocast_computes_in_its_dtype() -> None:
    model = create(Attention)
    exact = defined_output(model, SELECTOR, X)
    optimize(model, SELECTOR, min_length=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(X)
    assert out.dtype is torch.bfloat16
    assert rmse(out, exact) < 0.1


@pytest.mark.parametrize("catch", ["key", "mode"])
def test_an_eager_model_enters_one_mode_for_each_of_its_settings(
    catch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = optimize(create(), SELECTOR, min_length=0, dense_layers=(1,))
    if catch == "mode":
        monkeypatch.setattr(dispatch, "_key", None)
    depths: list[int] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda *_: depths.append(torch._C._len_torch_function_stack())
            )
    model(X)
    # The second layer has settings of its own inside those of the model.
    assert set(depths) == ({0} if catch == "key" else {1, 2})
