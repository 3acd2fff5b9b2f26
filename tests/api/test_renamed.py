"""Names of earlier releases say what they are now."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import unisparse_flex
from unisparse_flex import Calibration, Selector, UniSparse, block_masks, selectors
from unisparse_flex.calibration import Setting
from unisparse_flex.passes.calls import SparseConfig, decode_selector
from unisparse_flex.selectors import (
    DenseSpan,
    FlashPrefill,
    FlexPrefill,
    MInference,
    Oracle,
    StreamingLLM,
    XAttention,
)

MOVED = [
    "DEFAULT_SELECTOR",
    "FlexPrefill",
    "Oracle",
    "BlockSelection",
    "record_attention",
    "sparse",
]


@pytest.mark.parametrize("name", MOVED)
def test_a_name_that_moved_says_where_it_is(name: str) -> None:
    assert not hasattr(unisparse_flex, name)
    assert getattr(unisparse_flex, name, 3) == 3
    with pytest.raises(
        AttributeError, match=rf"unisparse_flex\.{name} is unisparse_flex\."
    ) as raised:
        getattr(unisparse_flex, name)
    place, _, new = str(raised.value).split(" is ")[1].removesuffix(" now").rpartition(".")
    assert hasattr(importlib.import_module(place), new)
    with pytest.raises(ImportError, match=f"cannot import name '{name}'"):
        exec(f"from unisparse_flex import {name}")


@pytest.mark.parametrize("name", block_masks._MOVED)
def test_a_name_that_left_block_masks_says_where_it_is(name: str) -> None:
    assert not hasattr(block_masks, name)
    assert getattr(block_masks, name, 3) == 3
    with pytest.raises(AttributeError, match=rf"block_masks\.{name} is unisparse_flex\.") as raised:
        getattr(block_masks, name)
    place, _, new = str(raised.value).split(" is ")[1].removesuffix(" now").rpartition(".")
    assert hasattr(importlib.import_module(place), new)
    with pytest.raises(ImportError, match=f"cannot import name '{name}'"):
        exec(f"from unisparse_flex.block_masks import {name}")


@pytest.mark.parametrize("module", [unisparse_flex, block_masks])
def test_a_name_that_never_was_is_no_attribute(module: ModuleType) -> None:
    assert not hasattr(module, "no_such_name")


def test_the_public_names_fit_on_one_screen() -> None:
    assert len(unisparse_flex.__all__) <= 13
    assert all(hasattr(unisparse_flex, name) for name in unisparse_flex.__all__)
    assert len(unisparse_flex.passes.__all__) == 6
    assert len(block_masks.__all__) <= 30
    assert not set(block_masks.__all__) & set(block_masks._MOVED)
    assert set(selectors.__all__) > {"UniSparse", "Selector", "Oracle", "FlexPrefill"}


@pytest.mark.parametrize(
    ("before", "now"), [("takes", "supports"), ("rows_alone", "row_independent")]
)
def test_a_selector_that_defines_an_old_name_is_refused(before: str, now: str) -> None:
    with pytest.raises(TypeError, match=f"define {now}, which was {before} before"):
        type("Own", (UniSparse,), {before: True})
    assert "Own" not in Selector.registry


def test_the_old_name_of_forced_blocks_says_the_new_one() -> None:
    with pytest.raises(AttributeError, match=r"UniSparse\.guards is UniSparse\.forced_blocks now"):
        _ = UniSparse().guards


RENAMED = [
    ("XAttention(threshold=0.8)", XAttention(top_p=0.8)),
    ("XAttention(threshold=0.9, head_thresholds=(0.5, 0.7))", XAttention(head_top_p=(0.5, 0.7))),
    ("FlexPrefill(gamma=0.95, tau=0.2)", FlexPrefill(top_p=0.95, tau=0.2)),
    (
        "MInference(forced_columns=3, forced_diagonals=7)",
        MInference(sink_tokens=3, local_tokens=7),
    ),
    ("StreamingLLM(dense_last=64)", StreamingLLM(last_query_tokens=64)),
    (
        "DenseSpan(selector=FlexPrefill(gamma=0.5), tokens='0:9')",
        DenseSpan(selector=FlexPrefill(top_p=0.5), tokens="0:9"),
    ),
]


@pytest.mark.parametrize(("text", "selector"), RENAMED)
def test_texts_with_old_names_of_fields_are_read_as_the_new_ones(
    text: str, selector: Selector
) -> None:
    assert decode_selector(text) == selector
    assert decode_selector(selector.text) == selector
    config = SparseConfig(selector=selector)
    assert SparseConfig.decode(config.encode().replace(selector.text, text)) == config


def test_calibrations_and_pickles_with_old_names_mean_the_same(tmp_path: Path) -> None:
    layers: dict[str, Setting] = {text: selector for text, selector in RENAMED}
    calibration = Calibration(
        layers=layers,
        quality="kl",
        target=0.1,
        reached=0.05,
        density=0.5,
        model="Model",
        unisparse_flex="0.1",
        torch="2.0",
    )
    written = json.loads(calibration.to_json())
    written["layers"] = {text: text for text, _ in RENAMED}
    (tmp_path / "old.json").write_text(json.dumps(written))
    assert Calibration.load(tmp_path / "old.json") == calibration
    make, (cls, values) = FlexPrefill(top_p=0.95).__reduce__()[:2]
    old = {"gamma" if name == "top_p" else name: value for name, value in values.items()}
    assert make(cls, old) == FlexPrefill(top_p=0.95)
    assert pickle.loads(pickle.dumps(FlexPrefill(top_p=0.95))) == FlexPrefill(top_p=0.95)


def test_both_names_of_a_field_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be given both top_p and gamma"):
        decode_selector("FlexPrefill(top_p=0.9, gamma=0.9)")


@pytest.mark.parametrize("cls", [XAttention, FlexPrefill, MInference, StreamingLLM])
def test_python_that_uses_an_old_name_is_told_the_new_one(cls: Any) -> None:
    assert cls.renamed_fields
    for old, new in cls.renamed_fields.items():
        assert new in cls.__dataclass_fields__
        assert old not in cls.__dataclass_fields__
        with pytest.raises(
            TypeError, match=f"has no {old} any more, got 1; it is called {new} now"
        ):
            cls(**{old: 1})
        with pytest.raises(TypeError, match=f"it is called {new} now"):
            dataclasses.replace(cls(), **{old: 1})


# What fields of selectors mean, whichever selector has them.
MEANINGS = {
    *("sink_blocks", "local_blocks", "last_query_blocks"),
    *("sink_tokens", "local_tokens", "last_query_tokens"),
    # A share of a row's mass; a share that a block must have itself.
    *("top_p", "head_top_p", "threshold", "head_thresholds", "threshold_blocks"),
}


def test_fields_that_mean_the_same_are_spelled_alike() -> None:
    """A new name beside these is either a meaning of its own or a second spelling."""
    own = {
        "UniSparse": {"c_q", "c_k", "c_h", "top_k", "sampled_queries"},
        "XAttention": {"stride"},
        "FlexPrefill": {"tau", "min_budget"},
        "MInference": {"vertical_slash", "last_q"},
        "FlashPrefill": {"alpha"},
        "DenseSpan": {"selector", "tokens", "rows", "keys"},
    }
    shipped: list[Any] = [
        UniSparse,
        XAttention,
        FlexPrefill,
        MInference,
        FlashPrefill,
        StreamingLLM,
        Oracle,
    ]
    for cls in (*shipped, DenseSpan):
        fields = set(cls.__dataclass_fields__) - {"block_size"}
        assert fields - own.get(cls.__name__, set()) <= MEANINGS
