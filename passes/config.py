"""What an optimized attention call carries with it: selector and thresholds, as one string.

The string stands inside the traced graph, so that it is part of every cache key, survives graph
breaks, export and saving, and tells two models with different settings apart.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, is_dataclass
from functools import lru_cache

from ..block_masks.selectors import Selector
from ..block_masks.validation import validate_int


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseConfig:
    """Settings of one attention call.

    Attributes:
        selector: Which blocks are kept.
        min_length: Fewest keys for which sparse attention is used.
        min_queries: Fewest queries for which it is used; fewer are decoding and stay dense.
        dense: Keeps the call dense (a layer that was excluded by name).
        strict: Raises where the call would stay dense (it was asked for by name).
    """

    selector: Selector
    min_length: int = 0
    min_queries: int = 0
    dense: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        validate_selector(self.selector)
        validate_int(self.min_length, "min_length", minimum=0)
        validate_int(self.min_queries, "min_queries", minimum=0)

    def encode(self) -> str:
        """The settings as one line of JSON; equal settings give equal text."""
        values = asdict(self) | {
            "selector": {"type": type(self.selector).__name__} | asdict(self.selector)  # type: ignore[call-overload]
        }
        return json.dumps(values, sort_keys=True)

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> SparseConfig:
        """Settings from `encode`'s text.

        Raises:
            ValueError: The text names a selector that no imported module defines.
        """
        values = json.loads(text)
        fields = values.pop("selector")
        name = fields.pop("type")
        if name not in Selector.registry:
            raise ValueError(
                f"selector must be one of {sorted(Selector.registry)}, got {name!r}; "
                "import the module that defines it first"
            )
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return SparseConfig(selector=Selector.registry[name](**fields), **values)


def validate_selector(selector: object) -> None:
    """Raises TypeError unless ``selector`` is an instance of a Selector dataclass."""
    if not isinstance(selector, Selector) or not is_dataclass(selector):
        raise TypeError(
            "selector must be a selector such as UniSparse(top_p=0.95), "
            f"got {selector!r} of type {type(selector).__name__}"
        )
