"""Settings as text, and selectors that a user defines."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import unisparse_flex
from tests.api.models import FINE, create, embeddings, qkv
from tests.api.reference import assert_computes, attend, rmse
from unisparse_flex import Selector, UniSparse, explain, optimize
from unisparse_flex.passes import SparseConfig
from unisparse_flex.passes.calls.config import decode_selector
from unisparse_flex.selectors import BlockSelection, DenseSpan, FlexPrefill, MInference

from .graphs import Stripes

TWO_SPANS = DenseSpan(selector=DenseSpan(selector=FINE, tokens="0:1"), tokens="9:11")
CONFIGS = [
    SparseConfig(selector=UniSparse()),
    SparseConfig(selector=FINE, min_length=7, min_queries=3),
    SparseConfig(selector=UniSparse(top_p=0.1 + 0.2), dense=True),
    SparseConfig(selector=UniSparse(top_p=1), strict=True),
    SparseConfig(selector=UniSparse(head_thresholds=(0.01, 0.0))),
    SparseConfig(selector=FlexPrefill(top_p=0.95, tau=0)),
    SparseConfig(selector=MInference(vertical_slash=((1, 2), (30, 400)))),
    SparseConfig(selector=DenseSpan(selector=FINE, tokens="3:40", rows=False)),
    SparseConfig(selector=TWO_SPANS),
    SparseConfig(selector=Stripes()),
    SparseConfig(selector=Stripes(columns=(), label="quotes ' \" and {braces} and \\")),
    SparseConfig(selector=Stripes(columns=(3, 1, 2), label="été")),
]


@pytest.fixture
def registry() -> Iterator[dict[str, type[Selector]]]:
    """Selectors defined inside are forgotten afterwards."""
    before = dict(Selector.registry)
    yield Selector.registry
    Selector.registry.clear()
    Selector.registry.update(before)


@pytest.mark.parametrize("config", CONFIGS)
def test_settings_are_read_back_as_they_were(config: SparseConfig) -> None:
    decoded = SparseConfig.decode(config.encode())
    assert decoded == config
    assert hash(decoded) == hash(config)
    assert decoded.encode() == config.encode()


@pytest.mark.parametrize("config", CONFIGS)
def test_equal_settings_give_equal_text_of_one_line(config: SparseConfig) -> None:
    assert copy.deepcopy(config).encode() == config.encode()
    assert "\n" not in config.encode()


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_selector_alone_is_read_back_as_it_was(config: SparseConfig) -> None:
    assert decode_selector(config.selector.text) == config.selector


def test_different_settings_give_different_text() -> None:
    assert len({config.encode() for config in CONFIGS}) == len(CONFIGS)


@pytest.mark.parametrize("config", CONFIGS)
def test_repr_can_be_pasted_back(config: SparseConfig) -> None:
    assert eval(repr(config)) == config


def test_tuples_of_tuples_are_read_back(registry: Any) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Pairs(Stripes):
        pairs: tuple[tuple[int, int], ...] = ()

    config = SparseConfig(selector=Pairs(pairs=((1, 2), (3, 4))))
    assert SparseConfig.decode(config.encode()) == config


def test_an_unknown_selector_is_named() -> None:
    text = CONFIGS[0].encode().replace("UniSparse", "Nowhere")
    with pytest.raises(ValueError, match=r"one of \[.*'UniSparse'.*\], got 'Nowhere'; import"):
        SparseConfig.decode(text)
    nested = SparseConfig(selector=DenseSpan(selector=UniSparse(), tokens="0:1")).encode()
    with pytest.raises(ValueError, match="got 'Nowhere'; import"):
        SparseConfig.decode(nested.replace("UniSparse", "Nowhere"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"selector": UniSparse}, TypeError, r"selector must be a selector such as .*got"),
        ({"selector": 0.95}, TypeError, "selector must be .*got 0.95 of type float"),
        ({"selector": None}, TypeError, "selector must be .*NoneType"),
        ({"min_length": -1}, ValueError, "min_length must be at least 0, got -1"),
        ({"min_length": 1.5}, TypeError, "min_length must be an int"),
        ({"min_queries": -1}, ValueError, "min_queries must be at least 0"),
    ],
)
def test_bad_settings_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        replace(CONFIGS[0], **changes)


def test_a_selector_of_a_user_is_what_attention_runs() -> None:
    selector = Stripes(columns=(0, 2))
    tensors = qkv(150)
    output = unisparse_flex.attention(*tensors, is_causal=True, enable_gqa=True, selector=selector)
    assert rmse(output, attend(*tensors, selector=selector, offset=0)) < 1e-6


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_selector_of_a_user_is_what_a_model_runs(backend: str | None) -> None:
    selector = Stripes(columns=(0, 2))
    model, x = create(), embeddings(150)
    optimized = optimize(copy.deepcopy(model), selector, min_length=0)
    run = optimized if backend is None else torch.compile(optimized, backend=backend)
    with torch.no_grad():
        assert_computes(run(x), model, selector, x)
    expected = selector.select(*qkv(150)[:2], is_causal=True).density()
    assert [call.density for call in explain(optimized, x).sparse] == [expected] * 2


def test_a_selector_defined_again_replaces_the_first(registry: Any) -> None:
    tensors = qkv(150)
    first = _everything(kept=True)
    dense = unisparse_flex.attention(*tensors, is_causal=True, enable_gqa=True, selector=first)
    assert rmse(dense, attend(*tensors, offset=0)) < 1e-6
    second = _everything(kept=False)
    sparse = unisparse_flex.attention(*tensors, is_causal=True, enable_gqa=True, selector=second)
    assert rmse(sparse, attend(*tensors, selector=second, offset=0)) < 1e-6


def _everything(*, kept: bool) -> Selector:
    """A selector of a class that has the same name and fields each time."""

    @dataclass(frozen=True, kw_only=True)
    class Again(Stripes):
        def compute_selection(self, query: Tensor, key: Tensor, **options: Any) -> BlockSelection:
            selection = super().compute_selection(query, key, **options)
            keep = selection.visible.expand_as(selection.keep) if kept else selection.keep
            return replace(selection, keep=keep)

    return Again()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("UniSparse(topp=0.9)", "UniSparse has no setting 'topp', got .*; did you mean top_p"),
        ("MInference(nonsense=1)", "MInference has no setting 'nonsense', got .*; it has "),
        ("DenseSpan(tokens='0:4')", "DenseSpan must be given selector, got .*; add selector="),
    ],
)
def test_a_name_that_is_no_setting_is_said_to_be_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_selector(text)
