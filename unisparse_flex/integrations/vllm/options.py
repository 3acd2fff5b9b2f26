"""`Options`: the plug-in's settings, by the library's own names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...block_masks import DEFAULT_SELECTOR, Selector
from ...block_masks.pages import DecodeSelector
from ...block_masks.selectors import choose_selector
from ...block_masks.validation import validate_int
from ...calibration import Calibration
from ...passes.calls import read_selector

KEY = "unisparse"
PARENTS = ("FLASH_ATTN", "TRITON_ATTN")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What ``additional_config["unisparse"]`` may hold; every default works.

    Attributes:
        selector: Which blocks are kept: a selector's text, ``"UniSparse(top_p=0.95)"``, or a
            quality in words. Beside it ``quality`` is a name too: ``"fast"``, ``"balanced"``,
            ``"high"`` or a number instead of a selector, as `optimize` takes it.
        calibration: Path of a calibration's file instead of either: layers have selectors of
            their own, and those that it does not name stay dense.
        decode: Sparse decoding, ``{"top_p": 0.95}`` or the like: which pages of its cache a row of
            one token reads, by the names of `DecodeSelector`. Off by default.
        min_length: Fewest keys for which a prefill row is sparse; by default a cost model decides
            for each row. 0 makes every row of a block or more sparse. With a number every row
            decodes sparse too, if ``decode`` is given.
        dense_layers: Indices of layers that stay dense, negative ones from the end.
        parent: ``"FLASH_ATTN"`` or ``"TRITON_ATTN"``; by default the one that vLLM would choose.
        untested_version: Whether a version of vLLM is tried that was not tested.
        log_seconds: Least seconds between two lines of the log that say what ran sparse.
    """

    selector: Selector = DEFAULT_SELECTOR
    calibration: Calibration | None = None
    decode: DecodeSelector | None = None
    min_length: int | None = None
    dense_layers: tuple[int, ...] = ()
    parent: str | None = None
    untested_version: bool = False
    log_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.min_length is not None:
            validate_int(self.min_length, "min_length", minimum=0)
        if self.decode is not None and not isinstance(self.decode, DecodeSelector):
            raise TypeError(
                f"decode must be a DecodeSelector, got {self.decode!r}; Options.read takes mappings"
            )
        for index in self.dense_layers:
            if isinstance(index, bool) or not isinstance(index, int):
                raise TypeError(f"dense_layers must be integers, got {index!r}; count from 0")
        if self.parent is not None and self.parent not in PARENTS:
            raise ValueError(
                f"parent must be one of {list(PARENTS)}, got {self.parent!r}; leave it out for "
                "vLLM's own choice"
            )
        if not isinstance(self.untested_version, bool):
            raise TypeError(
                f"untested_version must be true or false, got {self.untested_version!r}"
            )
        seconds = self.log_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or seconds <= 0:
            raise ValueError(f"log_seconds must be a number above 0, got {seconds!r}")

    @classmethod
    def read(cls, given: object) -> Options:
        """Settings from what ``additional_config["unisparse"]`` holds.

        Raises:
            TypeError: A value of the wrong kind.
            ValueError: An unknown name, a value out of its range, or two of ``selector``,
                ``quality`` and ``calibration``.
            OSError: ``calibration`` is a path that cannot be read.
        """
        if not isinstance(given, Mapping):
            raise TypeError(
                f"additional_config['{KEY}'] must be a mapping of settings, got {given!r}; use "
                "{} for the defaults"
            )
        known = sorted([*(field.name for field in fields(cls)), "quality"])
        unknown = sorted(set(map(str, given)) - set(known))
        if unknown:
            raise ValueError(
                f"additional_config['{KEY}'] must have names of {known}, got {unknown}; leave them "
                "out"
            )
        values: dict[str, Any] = dict(given)
        chosen = [n for n in ("selector", "quality", "calibration") if values.get(n) is not None]
        if len(chosen) > 1:
            raise ValueError(
                "selector, quality and calibration must not be given together, got "
                f"{' and '.join(chosen)}; give one"
            )
        if values.get("calibration") is not None:
            values["calibration"] = _load(values["calibration"])
        values["selector"] = _choose(values.get("selector"), values.pop("quality", None))
        values["decode"] = _read_decode(values.get("decode"))
        layers = values.get("dense_layers", ())
        if not isinstance(layers, (list, tuple)):
            raise TypeError(f"dense_layers must be a list of integers, got {layers!r}")
        values["dense_layers"] = tuple(layers)
        return cls(**values)


def _choose(selector: object, quality: Any) -> Selector:
    if selector is None:
        return choose_selector(None, quality)
    if not isinstance(selector, str):
        raise TypeError(
            f"selector must be a selector's text or a quality, got {selector!r}; write "
            '"UniSparse(top_p=0.95)"'
        )
    return read_selector(selector)


def _read_decode(given: object) -> DecodeSelector | None:
    if given is None:
        return None
    known = sorted(field.name for field in fields(DecodeSelector))
    if not isinstance(given, Mapping) or not given:
        raise TypeError(
            f"decode must be a mapping with names of {known}, got {given!r}; leave it out for "
            "dense decoding"
        )
    unknown = sorted(set(map(str, given)) - set(known))
    if unknown:
        raise ValueError(f"decode must have names of {known}, got {unknown}; leave them out")
    found = DecodeSelector(**given)
    if found.budget is not None and found.budget < found.min_keys:
        raise ValueError(
            f"decode must have a budget of at least min_keys, {found.min_keys}, got "
            f"{found.budget}; give a smaller min_keys too"
        )
    if found.keeps_all and not {"top_p", "share"} & set(given):
        raise ValueError(
            f"decode must have top_p, budget or share, got {dict(given)}; without one of them "
            "every page is kept"
        )
    return found


def _load(path: object) -> Calibration:
    if not isinstance(path, str):
        raise TypeError(f"calibration must be the path of a file, got {path!r}")
    return Calibration.load(Path(path))
