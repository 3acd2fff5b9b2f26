"""What is said where a model fails because it was given texts or lists in place of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def hint_at_tensors(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], way_out: str
) -> Iterator[None]:
    """Runs a model inside; says what it was given where it fails on something else than tensors.

    A module may take texts, lists and mappings: nothing is said of one that does.

    Args:
        args: What the model is given by position.
        kwargs: What it is given by name.
        way_out: How to give what a language model takes.

    Raises:
        TypeError: The model failed, and one of its inputs is a text, a list or a mapping.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        by_position = (
            (f"input {place} of the model", value) for place, value in enumerate(args, 1)
        )
        for name, value in (*by_position, *kwargs.items()):
            if isinstance(value, (str, bytes, list, Mapping)):
                raise TypeError(
                    f"{name} must be what its forward takes, got a {type(value).__name__}, with "
                    f"which it raised {type(error).__name__}; {way_out}"
                ) from error
        raise
