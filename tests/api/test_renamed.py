"""Names of earlier releases say what they are now."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

import unisparse_flex
from unisparse_flex import Selector, UniSparse, block_masks, selectors

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
    with pytest.raises(ImportError, match=rf"unisparse_flex\.{name} is unisparse_flex\.") as raised:
        getattr(unisparse_flex, name)
    place, _, new = str(raised.value).split(" is ")[1].removesuffix(" now").rpartition(".")
    assert hasattr(importlib.import_module(place), new)
    with pytest.raises(ImportError, match=r"now$"):
        exec(f"from unisparse_flex import {name}")


@pytest.mark.parametrize("name", block_masks._MOVED)
def test_a_name_that_left_block_masks_says_where_it_is(name: str) -> None:
    with pytest.raises(ImportError, match=rf"block_masks\.{name} is unisparse_flex\.") as raised:
        getattr(block_masks, name)
    place, _, new = str(raised.value).split(" is ")[1].removesuffix(" now").rpartition(".")
    assert hasattr(importlib.import_module(place), new)
    with pytest.raises(ImportError, match=r"now$"):
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
