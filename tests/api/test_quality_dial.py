"""quality=, the one dial, wherever settings are given; what is said where nothing is sparse."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unisparse_flex import (
    Calibration,
    UniSparse,
    attention,
    explain,
    is_optimized,
    optimize,
    patch_attention,
    restore,
    temporarily_optimize,
)
from unisparse_flex.catching import name_reason, settings_of
from unisparse_flex.passes import DenseReason, SparseConfig
from unisparse_flex.passes.attend import Outcomes
from unisparse_flex.passes.rewrite import all_dense
from unisparse_flex.selectors import MInference, PatchOrder, Selector, selector_of_quality

from .models import SELECTOR, Layer, Transformer, create, embeddings, qkv

HIGH = selector_of_quality("high")


def selector_in(model: nn.Module) -> Selector:
    config = settings_of(model)
    assert config is not None
    return SparseConfig.decode(config).selector


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, UniSparse()),
        ({"quality": "balanced"}, UniSparse()),
        ({"quality": "high"}, HIGH),
        ({"selector": "high"}, HIGH),
        ({"quality": 3}, HIGH),
        ({"quality": "fast"}, selector_of_quality("fast")),
        ({"selector": UniSparse(top_k=3)}, UniSparse(top_k=3)),
    ],
    ids=str,
)
def test_a_model_gets_the_settings_of_its_quality(
    arguments: dict[str, Any], expected: Selector
) -> None:
    model = create(Transformer)
    assert selector_in(optimize(model, **arguments)) == expected
    restore(model)
    with temporarily_optimize(model, **arguments):
        assert selector_in(model) == expected
    assert settings_of(model) is None


def test_layers_of_a_calibration_take_a_word(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    written = {
        "layers": {"layers.0.attention": "high", "layers.1.attention": "dense"},
        "quality": "kl",
        "target": 0.02,
        "reached": 0.01,
        "density": 0.5,
        "model": "Transformer",
        "unisparse_flex": "0.1.0",
        "torch": "2.13.0",
    }
    path.write_text(json.dumps(written))
    assert Calibration.load(path).layers["layers.0.attention"] == HIGH


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"quality": "best"}, ValueError, "one of 'fast', 'balanced', 'high', or a number"),
        (
            {"quality": None, "selector": "hihg"},
            FileNotFoundError,
            "'fast', 'balanced', 'high', 'paper'",
        ),
        ({"selector": "nothing(1).json"}, FileNotFoundError, "there is no file of this name"),
        ({"selector": "UniSparse(topp=0.9)"}, ValueError, r"setting 'topp', .*did you mean top_p"),
        ({"quality": "high", "selector": UniSparse()}, ValueError, "must not both be given"),
        ({"quality": "fast", "selector": "high"}, ValueError, "give selector or quality, not both"),
        ({"dense_layers": 0}, TypeError, "dense_layers must be a collection of layer indices"),
        ({"dense_layers": "0"}, TypeError, "dense_layers must be a collection of layer indices"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_and_changes_nothing(
    arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = create(Transformer)
    with pytest.raises(error, match=match):
        optimize(model, **arguments)
    assert settings_of(model) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("UniSparse(top_k=4)", UniSparse(top_k=4)),
        ("MInference()", MInference()),
        ("paper", UniSparse.paper()),
        ("default", UniSparse()),
        ("high", HIGH),
    ],
)
def test_a_selector_is_taken_as_the_command_takes_it(text: str, expected: Selector) -> None:
    model = create(Transformer)
    assert selector_in(optimize(model, text)) == expected
    assert selector_in(optimize(model, selector=text)) == expected


@pytest.mark.parametrize(
    ("selector", "way_out"),
    [("high", "as quality='high'"), (2.0, "give a number as quality=2.0")],
)
def test_what_a_single_call_does_not_take_has_a_way_out(selector: Any, way_out: str) -> None:
    query = torch.zeros(1, 1, 64, 16)
    with pytest.raises(TypeError, match=f"selector must be a selector .*{way_out}"):
        attention(query, query, query, selector=selector)


def test_a_calibration_has_no_quality_beside_it() -> None:
    calibration = Calibration(
        layers={"layers.0.attention": UniSparse()},
        quality="kl",
        target=0.02,
        reached=0.01,
        density=0.5,
        model="Transformer",
        unisparse_flex="0.1.0",
        torch="2.13.0",
    )
    with pytest.raises(ValueError, match="a calibration has a setting for each layer"):
        optimize(create(Transformer), calibration, quality="high")


@pytest.mark.parametrize("quality", ["fast", "high", 5])
def test_functions_attend_with_the_settings_of_a_quality(quality: Any) -> None:
    tensors = qkv(700, batch=1)
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": True}

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, quality=quality, **options)

    expected = attention(*tensors, selector=selector_of_quality(quality), **options)
    assert run(*tensors).equal(expected)
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), expected, atol=1e-5, rtol=1e-5)


def test_patches_take_a_quality_of_what_forces_no_text() -> None:
    order = PatchOrder(grid=(4, 16, 16), tile=(2, 8, 8))
    tensors = tuple(torch.randn(1, 2, order.num_tokens, 16) for _ in range(3))
    expected = patch_attention(
        *tensors, order=order, selector=UniSparse(sink_blocks=0, last_query_blocks=0)
    )
    assert patch_attention(*tensors, order=order, quality="balanced").equal(expected)


def test_a_registered_name_takes_a_quality() -> None:
    pytest.importorskip("transformers")
    from unisparse_flex.integrations import transformers as integration

    integration.register("dialled", quality="high")
    try:
        assert integration._registered["dialled"].settings.selector == HIGH
        with pytest.raises(ValueError, match="must not both be given"):
            integration.register("dialled", UniSparse(), quality="high")
    finally:
        integration.unregister("dialled")


def test_a_model_of_a_registered_name_is_optimized() -> None:
    transformers = pytest.importorskip("transformers")
    from unisparse_flex.integrations import transformers as integration

    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32
    )
    integration.register("named")
    try:
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="named")
        assert is_optimized(model)
        with pytest.warns(UserWarning, match=r"call model\.set_attn_implementation\('sdpa'\)"):
            restore(model)
        with temporarily_optimize(model):
            pass
        model.set_attn_implementation("sdpa")
        assert not is_optimized(model)
        assert restore(model) is model
    finally:
        integration.unregister("named")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "is sparse: its forward" in r.getMessage()]


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))], ids=repr)
def test_a_model_without_attention_is_told_so_once(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    optimize(model)
    for _ in range(2):
        model(torch.randn(2, 3))
    (warning,) = warnings_of(caplog)
    assert warning.startswith(f"nothing of {type(model).__name__}")
    restore(model)


def test_a_model_that_attends_by_itself_is_told_how_it_may_be_sparse(
    caplog: pytest.LogCaptureFixture,
) -> None:
    transformers = pytest.importorskip("transformers")
    caplog.set_level(logging.WARNING)
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=1,
        intermediate_size=32,
        vocab_size=50,
    )
    ids = torch.ones(1, 5, dtype=torch.long)
    for implementation, expected in (("eager", 1), ("sdpa", 0)):
        caplog.clear()
        model = transformers.LlamaForCausalLM._from_config(
            config, attn_implementation=implementation
        )
        optimize(model)(ids)
        found = warnings_of(caplog)
        assert len(found) == expected
        assert all("(attn_implementation='eager')" in warning for warning in found)


def test_compiled_layers_are_no_attention_that_was_missed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    torch._dynamo.reset()
    model = optimize(create(Transformer), min_length=0)
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    with torch.no_grad():
        model(embeddings(300))
    assert not warnings_of(caplog)


@pytest.mark.parametrize("dense_layers", [(), (0, 1)])
def test_attention_that_stays_dense_is_none_that_was_missed(
    dense_layers: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    model = optimize(create(Transformer), dense_layers=dense_layers)
    model.layers[0](embeddings(40))
    model(embeddings(40))
    assert isinstance(model.layers[0], Layer)
    assert not warnings_of(caplog)


def reasons_said(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [" ".join(record.getMessage().split()) for record in caplog.records]
    caplog.clear()
    return [text for text in said if "stay dense" in text or "stayed dense" in text]


@pytest.mark.parametrize("quality", ["fast", "high", 2.0])
def test_a_model_all_of_whose_calls_stay_dense_is_told_why(
    quality: str | float, caplog: pytest.LogCaptureFixture
) -> None:
    model = optimize(create(), quality=quality)
    with torch.no_grad():
        for tokens, reason in ((8, DenseReason.FEW_QUERIES), (200, DenseReason.SLOWER)):
            model(embeddings(tokens))
            (said,) = reasons_said(caplog)
            assert "all 2 calls of its attention stayed dense" in said
            assert reason in said
            model(embeddings(tokens))
            assert not reasons_said(caplog)
        model(embeddings(8))
    assert not reasons_said(caplog)


def test_gradients_on_a_cpu_are_named_as_what_keeps_calls_dense(
    caplog: pytest.LogCaptureFixture,
) -> None:
    optimize(create())(embeddings(200))
    (said,) = reasons_said(caplog)
    assert DenseReason.CPU_GRADIENT in said


def test_only_a_model_without_a_sparse_call_is_told_so(caplog: pytest.LogCaptureFixture) -> None:
    one_dense = optimize(create(), quality="high", min_length=0, dense_layers=(0,))
    all_excluded = optimize(create(), quality="high", min_length=0, dense_layers=(0, 1))
    layers_compiled = optimize(create(), quality="high")
    for layer in layers_compiled.layers:
        layer.compile(backend="eager")
    for model in (one_dense, all_excluded, layers_compiled):
        with torch.no_grad():
            model(embeddings(200))
        assert not reasons_said(caplog)


def test_explaining_a_model_leaves_the_word_to_its_first_forward(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = optimize(create(), quality="high")
    explain(model, embeddings(200))
    assert not reasons_said(caplog)
    model(embeddings(200))
    assert reasons_said(caplog)


def test_a_multihead_attention_that_returns_weights_is_told_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    optimize(Attends(), min_length=0)(torch.randn(1, 200, 32))
    (said,) = reasons_said(caplog)
    assert DenseReason.NEEDS_WEIGHTS in said
    assert "the only call of its attention stayed dense" in said


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("tokens", "reason"), [(24, DenseReason.FEW_QUERIES), (200, DenseReason.SLOWER)]
)
def test_a_compiled_model_all_of_whose_calls_stay_dense_is_told_why_once(
    cached: bool,
    tokens: int,
    reason: DenseReason,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where Inductor's cache has the graph, and no pass sees it."""
    for _ in range(1 + cached):
        monkeypatch.setattr(all_dense, "_told", set())
        monkeypatch.setattr(all_dense, "_sparse", set())
        caplog.clear()
        torch.compiler.reset()
        model = optimize(create(), quality="high")
        model.compile(dynamic=False)
        with torch.no_grad():
            model(embeddings(tokens))
            model(embeddings(tokens))
    (said,) = reasons_said(caplog)
    assert "all 2 attention calls stay dense" in said
    assert reason in said


def test_a_model_is_told_every_reason() -> None:
    outcomes = Outcomes({DenseReason.SLOWER: 1, DenseReason.FEW_QUERIES: 3})
    said = " ".join(name_reason("Model", outcomes).split())
    assert f"dense; 3 of them: {DenseReason.FEW_QUERIES}; 1: {DenseReason.SLOWER}; print" in said


@pytest.mark.parametrize("characters", range(1, 60, 7))
def test_what_a_model_is_told_to_paste_is_on_one_line(characters: int) -> None:
    lines = name_reason("M" * characters, Outcomes({DenseReason.SLOWER: 3})).splitlines()
    assert sum("print(unisparse_flex.explain(model, inputs))" in line for line in lines) == 1
    assert max(map(len, lines)) <= 80


def test_graphs_beside_a_sparse_one_are_told_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(all_dense, "_told", set())
    monkeypatch.setattr(all_dense, "_sparse", set())
    torch.compiler.reset()
    model = optimize(create(), SELECTOR, min_length=150)
    model.compile(dynamic=False)
    with torch.no_grad():
        for tokens in (200, 140, 8, 1):
            model(embeddings(tokens))
    assert not reasons_said(caplog)
