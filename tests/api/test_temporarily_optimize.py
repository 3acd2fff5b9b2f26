"""A model is optimized inside the block of `temporarily_optimize`, and as it was after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unisparse_flex import UniSparse, explain, is_optimized, optimize, restore, temporarily_optimize

from .models import FINE, SELECTOR, Transformer, create, embeddings
from .reference import assert_computes, assert_is_sparse

X = embeddings(200)
OTHER = UniSparse(block_size=32, top_k=2)


def output(model: Any, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x)


def state(model: nn.Module) -> list[tuple[type, dict[str, Any]]]:
    """What of each module is not a parameter, a buffer or a submodule."""
    return [
        (type(m), {k: v for k, v in vars(m).items() if not isinstance(v, dict)})
        for m in model.modules()
    ]


def decisions(model: Any) -> list[str]:
    return [call.decision for call in explain(model, X).calls]


def test_the_model_is_sparse_inside_and_as_before_behind() -> None:
    model = create()
    before = state(model)
    with temporarily_optimize(model, SELECTOR, min_length=0) as inside:
        assert inside is model
        assert_is_sparse(output(model), create(), SELECTOR, X)
    assert state(model) == before
    assert type(model) is Transformer
    assert output(model).equal(output(create()))


def test_an_exception_leaves_the_model_as_before() -> None:
    model = create()
    before = state(model)
    with (
        pytest.raises(KeyError, match="inside"),
        temporarily_optimize(model, SELECTOR, min_length=0),
    ):
        raise KeyError("inside")
    assert state(model) == before
    assert output(model).equal(output(create()))


def test_an_exception_of_the_forward_leaves_the_model_as_before() -> None:
    model = create()
    with pytest.raises(RuntimeError), temporarily_optimize(model, SELECTOR, min_length=0):
        model(torch.randn(3, 3))
    assert output(model).equal(output(create()))


def test_blocks_nest_and_the_innermost_decides() -> None:
    model = create()
    with temporarily_optimize(model, SELECTOR, min_length=0):
        with temporarily_optimize(model, FINE, min_length=0):
            assert_is_sparse(output(model), create(), FINE, X)
            with temporarily_optimize(model, OTHER, min_length=0):
                assert_is_sparse(output(model), create(), OTHER, X)
            assert_is_sparse(output(model), create(), FINE, X)
        assert_is_sparse(output(model), create(), SELECTOR, X)
    assert not is_optimized(model)


def test_an_optimized_model_has_its_own_settings_again() -> None:
    model = optimize(create(), SELECTOR, min_length=0)
    optimize(model.layers[1], FINE, min_length=0)
    before, exact = state(model), output(model)
    with temporarily_optimize(model, OTHER, min_length=0):
        assert_is_sparse(output(model), create(), OTHER, X)
    assert state(model) == before
    assert output(model).equal(exact)


def test_a_submodule_that_was_optimized_alone_still_is() -> None:
    model = create()
    optimize(model.layers[1], FINE, min_length=0)
    before = state(model)
    with temporarily_optimize(model, SELECTOR, min_length=0):
        assert is_optimized(model)
    assert state(model) == before
    assert decisions(model) == ["dense", "sparse"]


def test_a_block_around_a_submodule_changes_that_alone() -> None:
    model = create()
    with temporarily_optimize(model.layers[0], SELECTOR, min_length=0):
        assert decisions(model) == ["sparse", "dense"]
    assert output(model).equal(output(create()))


def test_what_is_optimized_or_restored_inside_is_undone() -> None:
    model = create()
    with temporarily_optimize(model, SELECTOR, min_length=0):
        optimize(model, FINE, min_length=0)
    assert not is_optimized(model)
    optimize(model, SELECTOR, min_length=0)
    with temporarily_optimize(model, FINE, min_length=0):
        restore(model)
        assert output(model).equal(output(create()))
    assert_is_sparse(output(model), create(), SELECTOR, X)


def test_layers_that_come_and_go_inside_end_as_they_were() -> None:
    model = optimize(create(), SELECTOR, min_length=0)
    first, fresh = model.layers[0], create().layers[0]
    with temporarily_optimize(model, FINE, min_length=0):
        model.layers[0] = optimize(fresh, FINE, min_length=0)
    assert not is_optimized(model.layers[0])
    model.layers[0] = first
    assert_is_sparse(output(model), create(), SELECTOR, X)


def test_the_settings_are_those_of_optimize() -> None:
    model = create()
    with temporarily_optimize(model, SELECTOR, min_length=0, dense_layers=(1,)):
        assert decisions(model) == ["sparse", "dense"]
    with temporarily_optimize(model, SELECTOR, min_length=201):
        assert decisions(model) == ["dense", "dense"]
    with temporarily_optimize(model):
        assert decisions(model) == ["dense", "dense"]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"backend": "cuda"}, ValueError),
        ({"dense_layers": (9,)}, ValueError),
        ({"selector": 3}, TypeError),
        ({"selector": "/no/such/calibration.json"}, OSError),
    ],
)
def test_settings_that_optimize_refuses_leave_the_model_as_it_was(
    settings: dict[str, Any], error: type[Exception]
) -> None:
    for model in (create(), optimize(create(), FINE, min_length=0)):
        before = state(model)
        with pytest.raises(error), temporarily_optimize(model, **settings):
            raise AssertionError("entered")
        assert state(model) == before


def test_what_is_no_module_is_refused_with_the_way_out() -> None:
    with pytest.raises(TypeError, match=r"pipe\.transformer"), temporarily_optimize(object()):  # type: ignore[type-var]
        raise AssertionError("entered")


def test_a_compiled_model_is_sparse_inside_and_plain_again_outside() -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(create(layers=1), backend="aot_eager", fullgraph=True)
    with temporarily_optimize(compiled, SELECTOR, min_length=0):
        assert_is_sparse(output(compiled), create(layers=1), SELECTOR, X)
    assert not is_optimized(compiled)
    assert_computes(output(compiled), create(layers=1), None, X)


def test_what_is_compiled_inside_compiles_anew_outside() -> None:
    torch._dynamo.reset()
    model = create(layers=1)
    with temporarily_optimize(model, SELECTOR, min_length=0):
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_is_sparse(output(compiled), create(layers=1), SELECTOR, X)
    assert_computes(output(compiled), create(layers=1), None, X)
    with temporarily_optimize(model, FINE, min_length=0):
        assert_is_sparse(output(compiled), create(layers=1), FINE, X)


def test_encoder_layers_of_torch_are_fused_again_unless_they_were_split_before() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, batch_first=True).eval()
    model = nn.Sequential(layer)
    with temporarily_optimize(model, SELECTOR, min_length=0):
        assert layer.activation_relu_or_gelu == 0
    assert layer.activation_relu_or_gelu == 1
    optimize(model, SELECTOR, min_length=0)
    with temporarily_optimize(model, FINE, min_length=0):
        pass
    assert layer.activation_relu_or_gelu == 0
