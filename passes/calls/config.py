"""What an optimized attention call carries with it: selector and thresholds, as one string.

The string stands inside the traced graph, so that it is part of every cache key, survives graph
breaks, export and saving, and tells two models with different settings apart.
"""

from __future__ import annotations

import ast
import re
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from ...block_masks.selectors import (
    DEFAULT_SELECTOR,
    QUALITIES,
    Selector,
    UniSparse,
    selector_of_quality,
    validate_selector,
)
from ...block_masks.validation import validate_int

SELECTOR_NAME = re.compile(r"=(\w+)\(")
BACKENDS = ("auto", "flash", "triton")
# More than any selector's text needs; the parser is not asked to read arbitrary nesting.
MAX_SELECTOR_CHARACTERS = 8192
NAMED_SELECTORS: dict[str, UniSparse] = {
    "default": DEFAULT_SELECTOR,
    **{quality: selector_of_quality(quality) for quality in QUALITIES},
    "paper": UniSparse.paper(),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseConfig:
    """Settings of one attention call.

    Attributes:
        selector: Which blocks are kept.
        min_length: Fewest keys for which sparse attention is used; ``None`` asks the cost model
            (`prediction`), call by call.
        min_queries: Fewest queries for which it is used; fewer are decoding and stay dense.
        dense: Keeps the call dense (a layer that was excluded by name).
        strict: Raises where the call would stay dense (it was asked for by name).
        backend: Which kernel attends on CUDA, one of ``BACKENDS``.
        context: Name of the group of ranks that share the tokens (`context.register_context`);
            ``None`` where a call sees all of them.
    """

    selector: Selector
    min_length: int | None = 0
    min_queries: int = 0
    dense: bool = False
    strict: bool = False
    backend: str = "auto"
    context: str | None = None

    def __post_init__(self) -> None:
        validate_selector(self.selector)
        if self.min_length is not None:
            validate_int(self.min_length, "min_length", minimum=0)
        validate_int(self.min_queries, "min_queries", minimum=0)
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {list(BACKENDS)}, got {self.backend!r}")

    @classmethod
    def of_model(
        cls,
        selector: Selector,
        *,
        min_length: int | None,
        dense: bool = False,
        backend: str = "auto",
        context: str | None = None,
    ) -> SparseConfig:
        """Settings of a model's calls: those of fewer queries than a block are decoding."""
        return cls(
            selector=selector,
            min_length=min_length,
            # What is no selector is refused with the other settings.
            min_queries=getattr(selector, "block_size", 0),
            dense=dense,
            backend=backend,
            context=context,
        )

    def encode(self) -> str:
        """The settings as the expression that makes them; equal settings give equal text.

        Plain enough for Dynamo to trace: it may run inside a compiled model.
        """
        return (
            f"SparseConfig(selector={self.selector.text}, min_length={self.min_length}, "
            f"min_queries={self.min_queries}, dense={self.dense}, strict={self.strict}, "
            f"backend={self.backend!r}, context={self.context!r})"
        )

    @staticmethod
    def decode(text: str) -> SparseConfig:
        """Settings from `encode`'s text; nothing in it is executed.

        Raises:
            ValueError: The text names a selector that no imported module defines.
        """
        return _decode(text, *map(Selector.registry.get, _names(text)))


@lru_cache(maxsize=256)
def _names(text: str) -> tuple[str, ...]:
    """The selectors that settings name."""
    return tuple(SELECTOR_NAME.findall(text))


@lru_cache(maxsize=256)
def _decode(text: str, *_distinct: object) -> SparseConfig:
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    return SparseConfig(**_decode_keywords(call, text))


def read_selector(text: str) -> Selector:
    """A selector from its name in `NAMED_SELECTORS`, or as `decode_selector` reads it.

    Raises:
        ValueError: The text is neither.
    """
    return NAMED_SELECTORS[text] if text in NAMED_SELECTORS else decode_selector(text)


def decode_selector(text: str) -> Selector:
    """A selector from its text, from a source that is not trusted; nothing in it is executed.

    Args:
        text: A call of a registered selector class with literals, or further selectors, by name,
            as `Selector.text`.

    Raises:
        ValueError: The text is anything else, or a selector does not take what it says.
    """
    if len(text) > MAX_SELECTOR_CHARACTERS:
        raise ValueError(
            f"a selector must have at most {MAX_SELECTOR_CHARACTERS} characters, got {len(text)}"
        )
    try:
        call: ast.AST | None = ast.parse(text, mode="eval").body
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        call = None
    return _decode_call(call, text)


def _decode_call(call: ast.AST | None, text: str) -> Selector:
    is_call = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args
    names = [k.arg for k in call.keywords] if isinstance(call, ast.Call) else []
    if not is_call or None in names or len(set(names)) < len(names):
        raise ValueError(
            "a selector must be a call with literals by name, such as UniSparse(top_p=0.95), each "
            f"once, got {text!r}"
        )
    assert isinstance(call, ast.Call)
    assert isinstance(call.func, ast.Name)
    values, name = _decode_keywords(call, text), call.func.id
    if name not in Selector.registry:
        raise ValueError(
            f"selector must be one of {sorted(Selector.registry)}, got {name!r}; "
            "import the module that defines it first"
        )
    _check_names(Selector.registry[name], values, text)
    try:
        selector = Selector.registry[name].from_values(values)
    except TypeError as error:
        raise ValueError(f"{name} does not take these values: {error}, got {text!r}") from None
    validate_selector(selector)
    return selector


def _check_names(cls: type[Selector], values: dict[str, Any], text: str) -> None:
    """Raises where a selector has no such setting, or needs another one."""
    # What is no dataclass is refused once it is made.
    known = {f.name: f for f in fields(cls) if f.init} if is_dataclass(cls) else {}
    for name in values if known else ():
        if name not in known and name not in cls.renamed_fields:
            near = get_close_matches(name, known, n=1)
            way_out = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"{cls.__name__} has no setting {name!r}, got {text!r}; {way_out}")
    given = {cls.renamed_fields.get(name, name) for name in values}
    for name, field in known.items():
        if name not in given and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{cls.__name__} must be given {name}, got {text!r}; add {name}=...")


def _decode_keywords(call: ast.Call, text: str) -> dict[str, Any]:
    return {k.arg: _decode_value(k.value, text) for k in call.keywords if k.arg is not None}


def _decode_value(value: ast.AST, text: str) -> Any:
    if isinstance(value, ast.Call):
        return _decode_call(value, text)
    try:
        return ast.literal_eval(value)
    except (TypeError, ValueError, RecursionError, MemoryError):
        return _decode_call(None, text)
