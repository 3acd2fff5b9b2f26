"""`Calibration`: the settings of each layer that reach a stated quality, and the file they live in.

The file is JSON for people to read. Reading one executes nothing, whoever wrote it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from .block_masks import Selector
from .passes.calls import read_selector

Setting = Selector | Literal["dense"]

DENSE: Literal["dense"] = "dense"
QUALITIES = ("recall", "kl")
MAX_FILE_BYTES = 1_000_000
# The longest prompt that was measured times this: what is reached at longer ones may differ much.
MOST_LONGER = 2
WAY_OUT = "write a new file with unisparse_flex.calibrate(...).save"
# Of files that were written before there were these.
OPTIONAL = {"uniform_density", "sizes", "lengths"}
# What ``calibrate --json`` prints beside a calibration; a file may hold that.
NOTES = "notes"
_TEXTS = ("model", "unisparse_flex", "torch")
LARGEST = sys.float_info.max
_NUMBERS = {"target": LARGEST, "reached": LARGEST, "density": 1.0}
# An int of more is no number that a float holds, and Python reads none of many thousands.
MAX_DIGITS = 400
# A message quotes the file, which may hold anything.
MAX_MESSAGE = 1000
# Of keys of a file that is something else.
MOST_NAMES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What `calibrate` found; `optimize` takes it, or the path of its file, as ``selector``.

    Attributes:
        layers: Modules that make attention calls, named as `explain` names them, each with its
            selector or ``"dense"``.
        quality: ``"recall"`` or ``"kl"``: what ``target`` and ``reached`` are.
        target: What was asked for: the least mean recall in [0, 1], or the most KL in nats.
        reached: What the calibration batches reached.
        density: Kept over visible blocks to expect in [0, 1], mean over the calls that could be
            sparse; one that stays dense counts as 1, those that keep a whole narrow sliding window
            are left out, unless all do.
        uniform_density: The density of the best setting that is the same in all layers and reaches
            the target too: what was gained is the difference. ``None`` where there is none, or the
            file is of before.
        model: Class name of the model.
        unisparse_flex: Version of this library.
        torch: Version of torch.
        sizes: What tells the model from others of its class: how many layers it has of the named
            kinds, and its numbers of heads, by the names that it has for them. `optimize` warns of
            a model with others. Empty where nobody looked.
        lengths: Numbers of keys of the calls that were measured, each once, from few to many: what
            is reached at others was not looked at. Empty where the file is of before.
    """

    layers: Mapping[str, Setting]
    quality: Literal["recall", "kl"]
    target: float
    reached: float
    density: float
    model: str
    unisparse_flex: str
    torch: str
    uniform_density: float | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    lengths: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.quality not in QUALITIES:
            raise ValueError(f"quality must be one of {list(QUALITIES)}, got {self.quality!r}")
        for name, highest in _NUMBERS.items():
            _validate_number(getattr(self, name), name, highest)
        if self.uniform_density is not None:
            _validate_number(self.uniform_density, "uniform_density", 1.0)
        for name in _TEXTS:
            _validate_text(getattr(self, name), name)
        if not isinstance(self.layers, Mapping) or not self.layers:
            raise ValueError(
                f"layers must map at least one module name to a selector, got {self.layers!r}"
            )
        for name, setting in self.layers.items():
            _validate_text(name, "a name in layers")
            if setting != DENSE and not isinstance(setting, Selector):
                raise ValueError(f"layers[{name!r}] must be a selector or 'dense', got {setting!r}")
        if not isinstance(self.sizes, Mapping):
            raise ValueError(f"sizes must map names to integers, got {self.sizes!r}; {WAY_OUT}")
        for name, size in self.sizes.items():
            _validate_text(name, "a name in sizes")
            if not isinstance(size, int) or isinstance(size, bool):
                raise ValueError(f"sizes[{name!r}] must be an integer, got {size!r}; {WAY_OUT}")
        object.__setattr__(self, "layers", dict(self.layers))
        _validate_lengths(self.lengths)
        object.__setattr__(self, "sizes", dict(self.sizes))
        object.__setattr__(self, "lengths", tuple(self.lengths))

    @property
    def sparse_layers(self) -> dict[str, Selector]:
        """The layers that may run sparse."""
        return {name: s for name, s in self.layers.items() if isinstance(s, Selector)}

    def is_far_beyond(self, tokens: int) -> bool:
        """Whether a prompt is more than twice as long as the longest that was measured."""
        return bool(self.lengths) and tokens > MOST_LONGER * max(self.lengths)

    def to_json(self) -> str:
        """The calibration as JSON, a line for each layer; equal ones give equal text."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}
        layers = {n: s.text if isinstance(s, Selector) else s for n, s in self.layers.items()}
        return json.dumps({**values, "layers": layers}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: The text is anything else; the message names the key.
        """
        try:
            return cls._read(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"a calibration must be JSON, got {error}; {WAY_OUT}") from None

    @classmethod
    def _read(cls, text: str) -> Calibration:
        values = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
        )
        if not isinstance(values, dict):
            raise ValueError(
                f"a calibration must be a JSON object, got {type(values).__name__}; {WAY_OUT}"
            )
        values.pop(NOTES, None)
        known = {f.name for f in fields(cls)}
        if set(values) | OPTIONAL != known:
            raise ValueError(f"{_say_keys(known, set(values))}; {WAY_OUT}")
        layers = values.pop("layers")
        if not isinstance(layers, dict):
            raise ValueError(f"layers must be a JSON object, got {layers!r}; {WAY_OUT}")
        settings = {name: _decode(name, text) for name, text in layers.items()}
        return cls(layers=settings, **values)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes `to_json` to ``path``, over what is there."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Calibration:
        """Reads a file that `save` wrote.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is larger than 1 MB or not what `save` writes; the message names the
                key.
        """
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        try:
            if len(data) > MAX_FILE_BYTES:
                raise ValueError(
                    f"a calibration must have at most {MAX_FILE_BYTES} bytes, got more; {WAY_OUT}"
                )
            return cls.from_json(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: a calibration must be UTF-8, got {error}; {WAY_OUT}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path}: {_shorten(str(error))}") from None


def _say_keys(known: set[str], found: set[str]) -> str:
    """What keeps a JSON object with such keys from being a calibration."""
    unknown, missing = sorted(found - known), sorted(known - found - OPTIONAL)
    if "layers" not in found:
        got = f"one with {_name_some(sorted(found))}" if found else "an empty one"
        return f"a calibration must be a JSON object with layers, got {got}"
    parts = [f"without {', '.join(missing)}"] if missing else []
    parts += [f"with {_name_some(unknown)}, which none has"] if unknown else []
    return f"a calibration must have the keys {', '.join(sorted(known))}, got one " + (
        " and ".join(parts)
    )


def _name_some(names: Sequence[str]) -> str:
    # Whatever the file holds, a message stays one line.
    first = [name if name.isidentifier() else repr(name) for name in names[:MOST_NAMES]]
    rest = len(names) - MOST_NAMES
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "")


def _decode(name: str, text: object) -> Setting:
    if text == DENSE:
        return DENSE
    if not isinstance(text, str):
        raise ValueError(
            f"layers[{name!r}] must be a selector's text, a quality or 'dense', got {text!r}; "
            f"{WAY_OUT}"
        )
    try:
        return read_selector(text)
    except ValueError as error:
        raise ValueError(f"layers[{name!r}]: {error}; {WAY_OUT}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"each key must be given once, got {twice} again; {WAY_OUT}")
    return found


def _shorten(message: str) -> str:
    """The message without what is in the middle of a long one."""
    if len(message) <= MAX_MESSAGE:
        return message
    return f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"numbers must be finite, got one of {len(digits)} digits; {WAY_OUT}")
    return int(digits)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"numbers must be finite, got {name}; {WAY_OUT}")


def _validate_number(value: object, name: str, highest: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # No conversion: an int may be too large for a float.
    if not number or not 0.0 <= value <= highest:  # type: ignore[operator]
        rule = "of at least 0" if highest == LARGEST else f"in [0, {highest:g}]"
        raise ValueError(f"{name} must be a finite number {rule}, got {value!r}; {WAY_OUT}")


def _validate_lengths(lengths: object) -> None:
    rule = "lengths must be integers above 0, each once, from small to large"
    if not isinstance(lengths, (list, tuple)):
        raise ValueError(f"{rule}, got {lengths!r}; {WAY_OUT}")
    for length in lengths:
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError(f"{rule}, got {length!r}; {WAY_OUT}")
    if any(a >= b for a, b in pairwise(lengths)):
        raise ValueError(f"{rule}, got {list(lengths)}; {WAY_OUT}")


def _validate_text(value: object, name: str) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a text, got {value!r}; {WAY_OUT}")
