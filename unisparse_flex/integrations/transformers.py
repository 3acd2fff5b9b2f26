"""Hugging Face transformers: ``attn_implementation="unisparse"``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from types import CellType
from typing import TYPE_CHECKING, Any

from ..block_masks import Selector
from ..block_masks.pages import DecodeSelector
from ..catching import set_up_key
from ..optimization import registered_names
from .transformers_attention import create_attention_function
from .transformers_config import AttentionSettings, configure, create_settings
from .transformers_masks import create_mask_function

if TYPE_CHECKING:
    from .transformers_decode import SparseStaticCache

OLDEST = "5.4"
# Hub kernels have a slash in their name, paged implementations a bar, and flash_attention_2 and
# flex_attention are matched by parts of theirs.
NAME = re.compile(r"(?!.*(sdpa|eager|flash|flex))[A-Za-z][A-Za-z0-9_]*")
# More than anybody puts around a function.
MOST_WRAPPERS = 256


@dataclass(frozen=True, slots=True)
class _Registered:
    settings: AttentionSettings
    attention: Any
    mask: Any

    def is_called_by(self, function: object) -> bool:
        """Whether a function is one of these, or what somebody wrapped around one of them.

        Libraries wrap every function that they find in transformers' mappings.
        """
        return any(found in (self.attention, self.mask) for found in _wrapped(function))


def _wrapped(function: Any) -> Iterator[Any]:
    """A function and what it wraps: by attribute, as a partial, an object or a closure."""
    pending, seen = [function], set[int]()
    while pending and len(seen) < MOST_WRAPPERS:
        current = pending.pop()
        if not callable(current) or isinstance(current, type) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        pending += [getattr(current, name, None) for name in ("__wrapped__", "__func__", "func")]
        pending += [cell.cell_contents for cell in _filled(getattr(current, "__closure__", None))]
        pending += getattr(current, "__defaults__", None) or ()
        pending += [*(getattr(current, "__kwdefaults__", None) or {}).values()]
        pending += [*(getattr(current, "__dict__", None) or {}).values()]


def _filled(cells: Collection[CellType] | None) -> Iterator[CellType]:
    for cell in cells or ():
        try:
            cell.cell_contents  # noqa: B018
        except ValueError:
            continue
        yield cell


_registered: dict[str, _Registered] = {}


def register(
    name: str = "unisparse",
    selector: Selector | str | None = None,
    *,
    quality: str | float | None = None,
    min_length: int | None = None,
    dense_layers: Collection[int] = (),
    backend: str = "auto",
) -> None:
    """Makes ``attn_implementation=name`` and ``model.set_attn_implementation(name)`` work.

    Call it once, before models are loaded with that name; for a sub-model too, as in
    ``{"text_config": "unisparse", "vision_config": "sdpa"}``. An attention and a mask function are
    registered: with the first alone, transformers would make no masks, and padding be attended to.
    Where a call runs dense it is what ``"sdpa"`` computes. Models run sparse compiled or not; on
    CUDA an eager model's attention is compiled once for all layers. Settings that a model got from
    `optimize` or `temporarily_optimize` win over those of its name, and so does each that is in its
    configuration (`configure`), which is saved with it. Registering again with the
    same settings changes nothing, whatever somebody has wrapped around the functions since; with
    others it replaces them, wrappers too, for every model of that name.

    Args:
        name: What models are asked for; several names have settings of their own.
        selector: Which blocks are kept; `UniSparse()` by default. A quality in words, ``"paper"``
            or a selector's text such as ``"UniSparse(top_p=0.95)"`` is taken here too.
        quality: As `optimize` takes it.
        min_length: As `optimize` takes it.
        dense_layers: Layers that stay dense, by the ``layer_idx`` of their attention, negative
            ones from the end; modules without one are not affected.
        backend: As `optimize` takes it.

    Raises:
        ImportError: transformers is missing or older than 5.4.
        TypeError: ``selector`` is no selector (a `Calibration` names modules: `optimize` or
            `temporarily_optimize` take it), or a layer is no integer.
        ValueError: ``name``, ``quality``, ``backend`` or the text of a selector is not one that can
            be, ``selector`` and ``quality`` are both given, or the name is taken.
    """
    functions = _import_transformers()
    validate_name(name)
    settings = create_settings(
        selector,
        quality=quality,
        min_length=min_length,
        dense_layers=dense_layers,
        backend=backend,
    )
    mine = _registered.get(name)
    for mapping, registered in functions.taken(name):
        if mine is None or not mine.is_called_by(registered):
            raise ValueError(
                f"name must not be registered by somebody else, got {name!r}, which {mapping} "
                "holds; choose another"
            )
    if mine is not None and mine.settings == settings:
        return
    set_up_key()
    attention = create_attention_function(functions.sdpa, settings)
    mask = create_mask_function(functions.sdpa_mask, settings.config().min_queries)
    _registered[name] = _Registered(settings, attention, mask)
    # Masks first: an attention function without them loses padding.
    functions.masks.register(name, mask)
    functions.attention.register(name, attention)
    registered_names.add(name)


def unregister(name: str = "unisparse") -> None:
    """Undoes `register`; models that are still set to ``name`` then raise when they are called.

    Args:
        name: As given to `register`; one that is not registered changes nothing.
    """
    mine = _registered.pop(name, None)
    if mine is None:
        return
    registered_names.discard(name)
    functions = _import_transformers()
    for mapping in (functions.attention, functions.masks):
        if mine.is_called_by(mapping._global_mapping.get(name)):
            del mapping._global_mapping[name]


def validate_name(name: object) -> None:
    """Raises unless transformers takes ``name`` for an implementation of its own kind."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            "name must be letters, digits and underscores, without the names of transformers' own "
            f"implementations (sdpa, eager, flash, flex), got {name!r}; use 'unisparse'"
        )


@dataclass(frozen=True, slots=True)
class _Functions:
    """What is used of transformers."""

    attention: Any
    masks: Any
    sdpa: Any
    sdpa_mask: Any

    def taken(self, name: str) -> list[tuple[str, Any]]:
        """The mappings that know a name, each with what it holds."""
        mappings = {"ALL_ATTENTION_FUNCTIONS": self.attention}
        mappings["ALL_MASK_ATTENTION_FUNCTIONS"] = self.masks
        return [(said, mapping[name]) for said, mapping in mappings.items() if name in mapping]


def _import_transformers() -> _Functions:
    try:
        import transformers
        from transformers import masking_utils, modeling_utils
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
    except ImportError as error:
        raise ImportError(
            f"this needs transformers {OLDEST} or newer: pip install 'unisparse-flex[transformers]'"
        ) from error
    version: str = transformers.__version__
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < tuple(map(int, OLDEST.split("."))):
        raise ImportError(
            f"this needs transformers {OLDEST} or newer, got {version}: "
            "pip install 'unisparse-flex[transformers]'"
        )
    return _Functions(
        attention=modeling_utils.ALL_ATTENTION_FUNCTIONS,
        masks=masking_utils.ALL_MASK_ATTENTION_FUNCTIONS,
        sdpa=sdpa_attention_forward,
        sdpa_mask=masking_utils.sdpa_mask,
    )


def __getattr__(name: str) -> Any:
    """`SparseStaticCache` derives from a class of transformers', which is imported for it alone."""
    if name != "SparseStaticCache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _import_transformers()
    from . import transformers_decode

    return transformers_decode.SparseStaticCache


__all__ = ["DecodeSelector", "SparseStaticCache", "configure", "register", "unregister"]
