"""What a selector is: query and key in, BlockSelection out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor

from ..block_selection import BlockSelection
from ..geometry import BlockGeometry
from ..granularity import CompositeKeys, pool_tokens
from ..mask_summary import MaskSummary
from ..scoring import default_scale
from ..selection import ForcedBlocks, SelectionRule, per_query_head, select_blocks
from ..selection_cost import SelectionCost
from ..validation import (
    validate_attn_mask,
    validate_causal_lengths,
    validate_causality,
    validate_literal,
    validate_query_key,
    validate_scale,
)

# What subclasses may still define under its old name.
RENAMED = {"takes": "supports", "rows_alone": "row_independent"}


class Selector(ABC):
    """Chooses key blocks for every query block of one attention call.

    A selector is a frozen dataclass of plain values (numbers, strings, tuples, ``None``) and of
    other selectors, so that it can be hashed, compared, printed and carried inside a traced graph.
    Subclasses are known by their class name from the moment they are defined. One with a
    ``__post_init__`` of its own ends it with ``Selector.__post_init__(self)``.

    Attributes:
        block_size: Tokens per block; a power of two of at least 16.
        row_independent: Whether what a query block keeps depends only on its own rows, the keys and
            where it stands (`BlockGeometry.rows_before`): ranks that hold parts of the rows can
            then each select for theirs.
        renamed_fields: What fields were called before; texts and pickles with the old names are
            read as the new ones.
    """

    __slots__ = ("_text",)
    registry: ClassVar[dict[str, type[Selector]]] = {}
    row_independent: ClassVar[bool] = False
    renamed_fields: ClassVar[Mapping[str, str]] = {}
    __dataclass_fields__: ClassVar[dict[str, Any]]
    block_size: int
    _text: str

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for before, now in RENAMED.items():
            if before in cls.__dict__:
                raise TypeError(
                    f"selector classes define {now}, which was {before} before, got {before} in "
                    f"{cls.__name__}; rename it"
                )
        known = Selector.registry.get(cls.__name__)
        if known is not None and known.__module__ != cls.__module__:
            raise TypeError(
                f"selector classes must differ in name, got {cls.__name__} in {cls.__module__} and "
                f"in {known.__module__}; rename one"
            )
        Selector.registry[cls.__name__] = cls

    def __post_init__(self) -> None:
        for name, value in self._values().items():
            if not isinstance(value, Selector):
                validate_literal(value, name)
        self._keep_text()

    def _keep_text(self) -> None:
        # Now, not when asked: Dynamo may make the numbers symbolic, a text stays a text.
        object.__setattr__(self, "_text", self._expression())

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Selector:
        """Makes a selector of stored fields, whose names may be those of before.

        Raises:
            ValueError: A field is given by both its names.
            TypeError: There is no such field, or a value is of another kind.
        """
        now = cls.renamed_fields
        for old in now.keys() & values.keys():
            if now[old] in values:
                raise ValueError(
                    f"{cls.__name__} must not be given both {now[old]} and {old}, which it was "
                    f"before; leave out {old}"
                )
        return cls(**{now.get(name, name): value for name, value in values.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (type(self), self._values())

    @property
    def text(self) -> str:
        """The selector as the expression that makes it; equal selectors give equal text.

        Raises:
            TypeError: The class has a ``__post_init__`` that does not end with Selector's.
        """
        text = getattr(self, "_text", None)
        if text is None:
            raise TypeError(
                f"{type(self).__name__}.__post_init__ must end with Selector.__post_init__(self)"
            )
        return text

    @property
    def cost(self) -> SelectionCost:
        """What the cost model takes the selector to do; a subclass that knows better says so."""
        return SelectionCost()

    def supports(self, *, causal: bool, masked: bool, self_attention: bool) -> bool:
        """Whether the method is defined for such calls; others stay dense in a model.

        Args:
            causal: Each query sees the keys up to its own position, in either alignment.
            masked: Something beside causality hides keys.
            self_attention: There are as many queries as keys.
        """
        return True

    @property
    def keys_per_composite(self) -> int | None:
        """Keys pooled into one where it needs no others; ``None`` where it needs every key."""
        return None

    def prepare_mask(
        self, query: Tensor, key: Tensor, *, geometry: BlockGeometry, scale: float
    ) -> list[Tensor]:
        """What a selection reads of the geometry's mask, for calls that share it.

        The layers of a compiled model have it made once. What it returns stands after the mask's
        own tensors where `compute_selection` is called (`MaskProgram.prepared`).
        """
        return []

    def kernel_obstacle(
        self,
        query: Tensor,
        key: Tensor,
        *,
        geometry: BlockGeometry,
        scale: float,
        attn_mask: Tensor | None,
    ) -> str | None:
        """Why `compute_selection` runs plain PyTorch; ``None`` where it runs GPU kernels."""
        return f"{type(self).__name__} has none"

    def pool_keys(self, key: Tensor, *, blocks: int) -> Tensor:
        """Composite keys of key [B, Hkv, Skv, D], for `select_from_composites`.

        Returns:
            [B, Hkv, blocks * block_size / keys_per_composite, D]; empty after the last key.
        """
        group = self.keys_per_composite
        assert group is not None
        return pool_tokens(key, group, groups=blocks * (self.block_size // group))[0]

    def select_from_composites(
        self, query: Tensor, keys: CompositeKeys, *, geometry: BlockGeometry, scale: float
    ) -> BlockSelection:
        """Selects as `compute_selection` does, from keys that were pooled elsewhere.

        Args:
            query: [B, Hq, Sq, D].
            keys: Pooled by `keys_per_composite`, those of every key block.
            geometry: The block grid, without a mask.
            scale: Factor on the logits.

        Raises:
            NotImplementedError: `keys_per_composite` is ``None``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must have the keys themselves, got composite keys; call "
            "compute_selection"
        )

    def _expression(self) -> str:
        arguments = [
            f"{name}={value.text if isinstance(value, Selector) else repr(value)}"
            for name, value in self._shown().items()
        ]
        return f"{type(self).__name__}({', '.join(arguments)})"

    def _shown(self) -> dict[str, Any]:
        """The fields that `text` names: enough to make an equal selector."""
        return self._values()

    def _values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def select(
        self,
        query: Tensor,
        key: Tensor,
        *,
        is_causal: bool = False,
        causal_lower_right: bool = False,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> BlockSelection:
        """Selects blocks; the entry point for callers outside a model.

        Args:
            query: [B, Hq, Sq, D], after rotary embedding.
            key: [B, Hkv, Skv, D]; Hkv divides Hq.
            is_causal: Query row r sees the keys up to r (top-left), as in SDPA.
            causal_lower_right: Query row r sees the keys up to r + Skv - Sq, so that the last row
                is aligned with the last key; needs Sq <= Skv, and goes without ``is_causal``.
            attn_mask: bool or float, broadcastable to [B, Hq, Sq, Skv]; not with a causal flag.
            scale: Factor on the logits; 1 / sqrt(D) by default.

        Returns:
            The kept blocks.

        Raises:
            TypeError: Not tensors, or dtypes that differ or are not floating.
            ValueError: Ranks, heads, devices or lengths that do not go together; two of
                ``is_causal``, ``causal_lower_right`` and ``attn_mask``.
        """
        validate_query_key(query, key)
        validate_scale(scale)
        validate_causality(is_causal, causal_lower_right, attn_mask)
        q_len, kv_len = query.shape[2], key.shape[2]
        if attn_mask is not None:
            validate_attn_mask(attn_mask, query, key)
        offset = 0 if is_causal else None
        if causal_lower_right:
            validate_causal_lengths(q_len, kv_len)
            offset = kv_len - q_len
        geometry = BlockGeometry(
            q_len=q_len,
            kv_len=kv_len,
            block_size=self.block_size,
            causal_offset=offset,
        )
        with torch.no_grad():
            return self.compute_selection(
                query,
                key,
                geometry=geometry,
                scale=default_scale(query.shape[3]) if scale is None else float(scale),
                attn_mask=attn_mask,
            )

    @abstractmethod
    def compute_selection(
        self,
        query: Tensor,
        key: Tensor,
        *,
        geometry: BlockGeometry,
        scale: float,
        attn_mask: Tensor | None,
    ) -> BlockSelection:
        """Selects blocks for inputs that were checked; traced under torch.compile.

        No host synchronisation, no shape that depends on data, no loop over heads.
        """


class RenamesFields:
    """Says what a field is called now where a selector is made with its name of before."""

    __slots__ = ()
    renamed_fields: ClassVar[Mapping[str, str]]

    def __new__(cls, *_: Any, **values: Any) -> Self:
        """Refuses the names of before."""
        for old in cls.renamed_fields.keys() & values.keys():
            raise TypeError(
                f"{cls.__name__} has no {old} any more, got {values[old]!r}; it is called "
                f"{cls.renamed_fields[old]} now"
            )
        return super().__new__(cls)


class ForcesBlocks:
    """The forced blocks of a selector that has the fields of `ForcedBlocks`."""

    __slots__ = ()
    sink_blocks: int
    local_blocks: int
    last_query_blocks: int

    @property
    def forced_blocks(self) -> ForcedBlocks:
        """The blocks that are kept in any case."""
        return ForcedBlocks.of(self)

    @property
    def guards(self) -> NoReturn:
        """What `forced_blocks` was called before."""
        raise AttributeError(
            f"{type(self).__name__}.guards is {type(self).__name__}.forced_blocks now"
        )

    def select_by(
        self,
        rule: SelectionRule,
        scores: Tensor,
        *,
        geometry: BlockGeometry,
        q_heads: int,
        mask: MaskSummary | None = None,
    ) -> BlockSelection:
        """What a rule keeps, and the forced blocks.

        Args:
            rule: Which blocks a row keeps.
            scores: float [B, Hs, Nq, Nk]; Hs divides Hq.
            geometry: The block grid.
            q_heads: Hq.
            mask: Summary of the call's ``attn_mask``.
        """
        keep, visible = select_blocks(
            scores, rule=rule, forced_blocks=self.forced_blocks, geometry=geometry, mask=mask
        )
        keep = per_query_head(keep, visible, q_heads)
        return BlockSelection(keep=keep, visible=visible, geometry=geometry)


def _make(cls: type[Selector], values: dict[str, Any]) -> Selector:
    return cls.from_values(values)


def validate_selector(selector: object) -> None:
    """Raises TypeError unless ``selector`` is an instance of a Selector dataclass."""
    if not isinstance(selector, Selector) or not is_dataclass(selector):
        got = f"{selector!r} of type {type(selector).__name__}"
        if isinstance(selector, type):
            got = f"the class {selector.__name__}; give {selector.__name__}()"
        elif isinstance(selector, str):
            got += "; give the selector itself, or a quality in words as quality='high'"
        elif isinstance(selector, (int, float)):
            got += "; give a number as quality=2.0"
        raise TypeError(f"selector must be a selector such as UniSparse(top_p=0.95), got {got}")
