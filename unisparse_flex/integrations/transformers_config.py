"""Settings that lie in a model's configuration and are saved with it: ``config.unisparse``."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..block_masks import Selector
from ..block_masks.selectors import choose_selector
from ..passes import SparseConfig
from ..passes.calls import read_selector

# The attribute of a configuration, and its keys.
ATTRIBUTE = "unisparse"
KEYS = ("quality", "selector", "min_length", "dense_layers", "backend")
# Those that say which blocks are kept: one of them replaces the other.
SELECTS = ("quality", "selector")


# The fields of `CallTexts`.
Texts = tuple[str, str, tuple[int, ...], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSettings:
    """Settings of one registered name, or of one model; see `register`."""

    selector: Selector
    min_length: int | None
    dense_layers: tuple[int, ...]
    backend: str

    def config(self, *, dense: bool = False) -> SparseConfig:
        """The settings of a call, ``dense`` those of the layers that stay so."""
        return SparseConfig.of_model(
            self.selector, min_length=self.min_length, dense=dense, backend=self.backend
        )


def create_settings(
    selector: Selector | str | None = None,
    *,
    quality: str | float | None = None,
    min_length: int | None = None,
    dense_layers: Collection[int] = (),
    backend: str = "auto",
) -> AttentionSettings:
    """What `register` takes, checked.

    Raises:
        TypeError, ValueError: As `register`.
    """
    if isinstance(selector, str):
        if selector.endswith(".json"):
            raise TypeError(
                "selector must be a selector, its text or a quality, got the file "
                f"{selector!r}; a calibration names modules: give it to optimize"
            )
        selector = read_selector(selector)
    settings = AttentionSettings(
        selector=choose_selector(selector, quality),
        min_length=min_length,
        dense_layers=_validate_layers(dense_layers),
        backend=backend,
    )
    settings.config()
    return settings


def configure(
    config: Any,
    selector: Selector | str | None = None,
    *,
    quality: str | float | None = None,
    min_length: int | None = None,
    dense_layers: Collection[int] | None = None,
    backend: str | None = None,
) -> None:
    """Keeps settings in a model's configuration: ``save_pretrained`` saves them with the model.

    A registered name then runs the model by them, in this process and wherever the model is loaded
    with ``attn_implementation="unisparse"``. What is given here wins over what the name was
    registered with; what is left out, or ``None``, is as registered. They are plain values in
    ``config.json`` under ``"unisparse"``, in place of any that were there; to take them out, ``del
    config.unisparse``.

    Args:
        config: ``model.config``; of a model of several parts that of the part, such as
            ``model.config.text_config``.
        selector: As `register` takes it; a selector or a quality replaces either.
        quality: As `register` takes it.
        min_length: As `register` takes it.
        dense_layers: As `register` takes it; ``()`` for none, whatever is registered.
        backend: As `register` takes it.

    Raises:
        TypeError: ``config`` is a model or no configuration, or as `register`.
        ValueError: As `register`.
    """
    if isinstance(config, nn.Module) or not hasattr(config, "to_dict"):
        raise TypeError(
            f"config must be a model's configuration, got {type(config).__name__}; give such as "
            "model.config"
        )
    settings = create_settings(
        selector,
        quality=quality,
        min_length=min_length,
        dense_layers=dense_layers or (),
        backend=backend or "auto",
    )
    values: dict[str, Any] = {} if quality is None else {"quality": quality}
    if selector is not None:
        values["selector"] = settings.selector.text
    if min_length is not None:
        values["min_length"] = min_length
    if dense_layers is not None:
        values["dense_layers"] = list(settings.dense_layers)
    if backend is not None:
        values["backend"] = backend
    setattr(config, ATTRIBUTE, values)


@dataclass(frozen=True, kw_only=True, slots=True)
class CallTexts:
    """Settings as calls carry them.

    Attributes:
        sparse: Of layers that may be sparse.
        dense: Of those that stay dense.
        dense_layers: Which.
        min_queries: Fewest queries of a call that may be sparse.
    """

    sparse: str
    dense: str
    dense_layers: tuple[int, ...]
    min_queries: int

    @classmethod
    def of(cls, settings: AttentionSettings) -> CallTexts:
        """The texts of settings."""
        config = settings.config()
        return cls(
            sparse=config.encode(),
            dense=settings.config(dense=True).encode(),
            dense_layers=settings.dense_layers,
            min_queries=config.min_queries,
        )


def stored_values(module: nn.Module) -> Any:
    """What ``config.unisparse`` of an attention module holds; ``None`` where there is none."""
    return getattr(getattr(module, "config", None), ATTRIBUTE, None)


def saved_values(model: Any) -> Any:
    """What attention of a language model finds in its configuration; ``None`` for nothing."""
    config: Any = getattr(model, "config", None)
    of_text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(of_text, ATTRIBUTE, None)


def create_reader(registered: AttentionSettings) -> Callable[[Any], Texts]:
    """A function that reads stored values: the fields of the `CallTexts` of what a call has.

    It raises ValueError where they are not what `configure` writes.

    Args:
        registered: What counts where the values say nothing.
    """

    @lru_cache(maxsize=256)
    def read(written: str) -> Texts:
        texts = CallTexts.of(merge_settings(registered, ast.literal_eval(written)))
        return texts.sparse, texts.dense, texts.dense_layers, texts.min_queries

    # Dynamo guards what the values hold.
    @torch.compiler.assume_constant_result
    def read_texts(values: Any) -> Texts:
        return read(repr(values)) if _is_plain(values) else _refuse(values)

    return read_texts


def merge_settings(registered: AttentionSettings, values: Any) -> AttentionSettings:
    """Settings of a model: those in its configuration, key by key, the others as registered.

    Raises:
        ValueError: The values are not what `configure` writes.
    """
    saved, said = read_settings(values), stated(values)
    fields = {"selector" if key in SELECTS else key for key in said}
    return replace(registered, **{name: getattr(saved, name) for name in fields})


def read_settings(values: Any) -> AttentionSettings:
    """The settings that stored values are, with defaults where they say nothing.

    Raises:
        ValueError: They are not what `configure` writes.
    """
    if not _is_plain(values) or not isinstance(values, dict) or not set(values) <= set(KEYS):
        _refuse(values)
    try:
        return create_settings(**stated(values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.{ATTRIBUTE}: {error}") from error


def stated(values: Mapping[str, Any]) -> dict[str, Any]:
    """The stored values that say something, in the order of `KEYS`."""
    return {key: values[key] for key in KEYS if values.get(key) is not None}


def _is_plain(values: Any) -> bool:
    if isinstance(values, Mapping):
        return isinstance(values, dict) and all(map(_is_plain, (*values, *values.values())))
    if isinstance(values, (list, tuple)):
        return all(map(_is_plain, values))
    if isinstance(values, float):
        return math.isfinite(values)
    return values is None or isinstance(values, (str, int))


def _refuse(values: Any) -> Any:
    raise ValueError(
        f"config.{ATTRIBUTE} must be a dict with keys of {', '.join(KEYS)}, got {values!r}; write "
        "it with unisparse_flex.integrations.transformers.configure"
    )


def _validate_layers(dense_layers: Collection[int]) -> tuple[int, ...]:
    for index in dense_layers:
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(
                f"dense_layers must hold integers, got {index!r} of type {type(index).__name__}"
            )
    return tuple(sorted(set(dense_layers)))
