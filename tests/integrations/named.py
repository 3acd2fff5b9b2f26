"""Tiny models of transformers that are set to a registered implementation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.models.families import BY_NAME
from tests.models.family import SELECTOR
from unisparse_flex import Selector
from unisparse_flex.integrations.transformers import register, unregister

NAME = "unisparse"


@contextmanager
def registered(
    selector: Selector | str | None = SELECTOR, *, name: str = NAME, **settings: Any
) -> Iterator[str]:
    """A name that every call that can be is sparse under, inside."""
    register(name, selector, **{"min_length": 0, **settings})
    try:
        yield name
    finally:
        unregister(name)


def create(family: str, implementation: Any = NAME) -> Any:
    """A model of the coverage table under another implementation than "sdpa"."""
    model = BY_NAME[family].create()
    model.set_attn_implementation(implementation)
    return model
