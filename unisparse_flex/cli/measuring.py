"""What `quality` and `speed` share: arguments, checked before a model is loaded, and the report."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..command_line import CommandLine
from ..counted import counted
from ..wrapping import wrap
from . import PROGRAM
from .arguments import ChecksFiles, check_quality, file_to_write, is_given, model_argument
from .choices import TEXT_NAMES
from .failures import failures, wrong_arguments
from .options import (
    LAYER_OPTIONS,
    LOAD_OPTIONS,
    html_option,
    json_option,
    quiet_option,
    selector_option,
)
from .output import print_json, say_source, say_written, write_text

if TYPE_CHECKING:
    from ..calibration import Calibration
    from ..evaluation import LoadedModel, Sparsity, TextPrompt
    from ..selectors import Selector

DEFAULT_LENGTH, LEAST_LENGTH = 4096, 256
# More than any of the installed texts needs for a token.
CHARACTERS_PER_TOKEN = 6
COLUMNS = 80

model_argument_of_command = click.argument("model", callback=model_argument)


class KeepsCommand(ChecksFiles):
    """Keeps what was typed: the JSON file says it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Reads the arguments."""
        ctx.obj = [PROGRAM, self.name, *args]
        return super().parse_args(ctx, args)


def split_outside_brackets(text: str) -> list[str]:
    """The parts of a list with commas between them; those inside of brackets part nothing."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def lengths_argument(_: click.Context, __: click.Parameter, text: str) -> tuple[int, ...]:
    """Lengths are whole numbers of tokens, shortest first."""
    lengths = []
    for part in split_outside_brackets(text):
        if not re.fullmatch(r"\d{1,9}", part) or int(part) < LEAST_LENGTH:
            raise click.UsageError(
                f"{_lengths_option()} must be whole numbers of at least {LEAST_LENGTH} tokens, "
                f"got {part!r}; give such as 4096,8192"
            )
        lengths.append(int(part))
    if text and not lengths:
        raise click.UsageError(f"{_lengths_option()} must name at least one length, got {text!r}")
    return tuple(sorted(lengths))


def _lengths_option() -> str:
    """What the lengths were given by: the option has two names."""
    context = click.get_current_context(silent=True)
    typed = [str(word).partition("=")[0] for word in (context.obj if context else None) or ()]
    return "--tokens" if "--tokens" in typed and "--lengths" not in typed else "--lengths"


def quality_argument(_: click.Context, __: click.Parameter, text: str) -> tuple[str, ...]:
    """Settings of the dial are names or numbers."""
    names = split_outside_brackets(text)
    for name in names:
        check_quality(name)
    if not names:
        raise click.UsageError(
            f"--quality must name at least one setting, got {text!r}; give such as balanced,high"
        )
    return tuple(names)


def repeats_option(help_text: str) -> Any:
    """--repeats."""
    return click.option("--repeats", type=click.IntRange(min=1), metavar="N", help=help_text)


lengths_option = click.option(
    "--lengths",
    "--tokens",
    "lengths",
    default="",
    metavar="N,...",
    callback=lengths_argument,
    help=f"Prompt lengths in tokens.  [default: {DEFAULT_LENGTH}, or the model's context if less]",
)
selector_of_command = selector_option(
    None, "What is measured in place of the default of --quality, or beside what that names: "
)
PLACE_OPTIONS = (*LOAD_OPTIONS, *LAYER_OPTIONS)
OUTPUT_OPTIONS = (
    json_option,
    click.option(
        "--output",
        "-o",
        type=click.Path(path_type=Path),
        metavar="FILE",
        callback=file_to_write,
        help="Also write the JSON to a file.",
    ),
    html_option,
    quiet_option,
)


def check_before_loading(
    model: str,
    lengths: Sequence[int],
    texts: Sequence[str],
    *,
    layers: Sequence[int],
    device: str | None,
    backend: str,
) -> None:
    """Raises where lengths go beyond the model's context or a text, as far as files say so.

    Raises:
        click.UsageError: A length is too long, the model has no such layer, the device no such
            kernel, or settings saved with the model cannot be used.
    """
    from .models import check_backend, check_layers, stated_context
    from .saved import check_saved

    check_layers(model, layers)
    check_backend(backend, device)
    check_saved(model, device=device)
    refuse_beyond(lengths, stated_context(model))
    for name in texts:
        if name not in TEXT_NAMES and lengths and Path(name).stat().st_size < lengths[-1]:
            # A token has at least one byte.
            size = counted(Path(name).stat().st_size, "byte")
            raise click.UsageError(
                f"{_lengths_option()} must be at most the tokens of every text, got {lengths[-1]} "
                f"for {name}, a file of {size}; give a longer --text"
            )


def refuse_beyond(lengths: Sequence[int], context: int | None) -> None:
    """Raises where a length is longer than the model's context."""
    for length in lengths:
        if context is not None and length > context:
            raise click.UsageError(
                f"{_lengths_option()} must be at most the model's context, {context}, got {length}"
            )


def create_dial(names: Sequence[str], selector: str | None) -> dict[str, Selector | Calibration]:
    """What is measured, by what it is called: a calibration by the name of its file.

    Args:
        names: Of ``--quality``; its default counts where there is no ``--selector``.
        selector: Of ``--selector``.
    """
    from .selectors import parse_quality, parse_selector

    dial: dict[str, Selector | Calibration] = {}
    if selector is not None:
        name = Path(selector).name if selector.endswith(".json") else selector
        dial[name] = parse_selector(selector)
    if selector is None or is_given("quality"):
        dial |= {name: parse_quality(name) for name in names}
    return dial


def check_calibrations(
    loaded: LoadedModel, settings: Mapping[str, Selector | Calibration], sparsity: Sparsity
) -> None:
    """Raises where a calibration names layers that the model does not have, before it is measured.

    Raises:
        click.UsageError: It does.
    """
    from ..selectors import Selector

    for setting in settings.values():
        if not isinstance(setting, Selector):
            with wrong_arguments(), sparsity.applied(loaded.model, setting):
                pass


def describe_all(settings: Mapping[str, Selector | Calibration], tokens: int) -> dict[str, str]:
    """What is measured in words, by what it is called.

    Args:
        settings: By what they are called.
        tokens: Of the longest prompt.
    """
    from .selectors import describe

    return {name: describe(setting, name, tokens) for name, setting in settings.items()}


def head_lines(values: Mapping[str, Any]) -> list[str]:
    """What both texts begin with: the model, where settings come from, the calibration.

    Args:
        values: The JSON values.
    """
    device = values["device"]
    head = f"{values['model']}: {values['model_class']}, {device['dtype']} on {device['name']}"
    lines = [wrap(head, COLUMNS), *say_source(values["settings"]["source"], COLUMNS)]
    selector = values["settings"]["selector"] or ""
    if selector.endswith(".json") and Path(selector).name in values["selectors"]:
        lines.append(wrap(values["selectors"][Path(selector).name], COLUMNS))
    return lines


def write_explain(
    line: CommandLine, name: str, selector: str | None, tokens: int, **changed: str | None
) -> str:
    """The command that explains one of the settings that were measured, at one length.

    Args:
        line: The options of this run.
        name: What the setting is called.
        selector: Of ``--selector``.
        tokens: The length; it is written where lengths were given.
        **changed: Other options with other values.
    """
    options = line.options
    selects = selector is not None and name in (selector, Path(selector).name)
    # What was saved with the model needs no option, nor does what both do by default.
    of_dial = not selects and "--quality" in options
    return line.write(
        "explain",
        tokens=str(tokens) if "--tokens" in options else None,
        selector=selector if selects else None,
        quality=name if of_dial else None,
        **changed,
    )


def read_texts(names: Sequence[str], lengths: Sequence[int]) -> dict[str, str]:
    """The texts by their names; of an installed one, enough for the longest length."""
    from .prompts import read_text

    characters = (max(lengths) if lengths else DEFAULT_LENGTH) * CHARACTERS_PER_TOKEN
    return {name: read_text(name, characters=characters) for name in dict.fromkeys(names)}


def create_prompts(
    loaded: LoadedModel, texts: dict[str, str], lengths: Sequence[int]
) -> list[TextPrompt]:
    """A prompt for each length and text, all of them before anything is measured.

    Raises:
        click.UsageError: A length goes beyond the model's context or a text.
    """
    import torch

    from ..evaluation import TextPrompt, encode_start
    from .models import context_length

    context = context_length(loaded.model)
    refuse_beyond(lengths, context)
    wanted = lengths or (min(DEFAULT_LENGTH, context or DEFAULT_LENGTH),)
    prompts = []
    for length in wanted:
        for name, text in texts.items():
            ids = encode_start(loaded.tokenizer, text, length)
            if len(ids) < length:
                raise click.UsageError(
                    f"{_lengths_option()} must be at most the "
                    f"{counted(len(ids), 'token')} of {name}, got {length}; give a longer --text"
                )
            input_ids = torch.tensor([ids], device=loaded.device)
            prompts.append(TextPrompt(text=name, input_ids=input_ids))
    return prompts


def describe_run(
    ctx_command: list[str], kind: str, model: str, loaded: LoadedModel
) -> dict[str, Any]:
    """What the JSON of both commands begins with."""
    from ..evaluation import describe_device
    from ..reports import find_versions

    return {
        "schema": 1,
        "kind": kind,
        "model": model,
        "model_class": type(loaded.model).__name__,
        "weights": "as loaded",
        "densities": "free",
        "device": {
            "name": describe_device(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
        },
        "versions": find_versions(),
        "command": ctx_command,
    }


def write_results(
    values: dict[str, Any],
    text: str,
    page: str | None,
    *,
    as_json: bool,
    output: Path | None,
    html: Path | None,
    quiet: bool,
) -> None:
    """Prints the table or the JSON and writes the files."""
    if output is not None:
        with failures(f"write {output}"):
            content = json.dumps(values, indent=2, allow_nan=False)
        write_text(output, content + "\n")
    if html is not None and page is not None:
        write_text(html, page)
    if as_json:
        print_json(values)
    else:
        click.echo(text)
    say_written([path for path in (output, html) if path is not None], quiet=quiet)


def say_kl(kl: float) -> str:
    """A divergence with two digits."""
    return f"{kl:#.2g}" if kl >= 1e-4 else "less than 0.0001"


def shorten_start(text: str, width: int) -> str:
    """A text that fits: the end of a longer one, after an ellipsis."""
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]


def shorten_end(text: str, width: int) -> str:
    """A text that fits: the beginning of a longer one, before an ellipsis."""
    return text if len(text) <= width else text[: width - 1] + "…"
