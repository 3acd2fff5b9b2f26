"""The blocks that calls keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from unisparse_flex.passes import observe_calls


@contextmanager
def kept_blocks() -> Iterator[list[Tensor]]:
    """The kept blocks of every sparse call inside, [B, H, Nq, Nk], in a list that grows."""
    found: list[Tensor] = []

    def observe(_call: Any, _config: Any, selection: Any, _reason: Any) -> None:
        found.append(selection.keep)

    with observe_calls(observe):
        yield found
