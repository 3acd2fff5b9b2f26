"""Options that several commands share, and the model that they describe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..counted import counted
from ..progress import Progress
from .arguments import (
    device_argument,
    file_to_write,
    layers_argument,
    only_selector_argument,
    selector_argument,
    setting_argument,
    text_argument,
)
from .choices import BACKENDS, SELECTOR_NAMES
from .failures import wrong_arguments
from .output import SOURCE

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation import LoadedModel

Command = Callable[..., Any]

json_option = click.option(
    "as_json", "--json", is_flag=True, help="Print JSON and nothing else to standard output."
)
quiet_option = click.option(
    "--quiet", "-q", is_flag=True, help="Show no progress on standard error."
)
LOAD_OPTIONS = (
    click.option(
        "--allow-download",
        is_flag=True,
        is_eager=True,  # read before MODEL, which it allows more of
        help="Let MODEL be a name on the Hugging Face hub, downloaded if need be.",
    ),
    click.option(
        "--device",
        metavar="DEVICE",
        callback=device_argument,
        help="cpu, cuda or cuda:N.  [default: GPU if any]",
    ),
)
MODEL_OPTIONS = (
    *LOAD_OPTIONS,
    click.option(
        "--tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help="Length of the prompt.  [default: 4096, or the text's or the model's if less]",
    ),
)
LAYER_OPTIONS = (
    click.option(
        "--dense-layers",
        metavar="I,J-K,...",
        default="",
        callback=layers_argument,
        help="Layers that stay dense, such as 0-10,20; negative ones from the end.",
    ),
    click.option(
        "--backend",
        type=click.Choice(BACKENDS),
        default="auto",
        show_default=True,
        help="Kernel on CUDA.",
    ),
)


def min_length_option(default: int | None = None) -> Callable[[Command], Command]:
    """--min-length.

    Args:
        default: Of the command; ``None`` leaves it to the cost model.
    """
    by_model = "" if default is not None else "  [default: the cost model decides]"
    return click.option(
        "--min-length",
        type=click.IntRange(min=0),
        default=default,
        show_default=default is not None,
        metavar="N",
        help=f"Fewest keys for which attention is sparse; 0 for every call that can be.{by_model}",
    )


html_option = click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    callback=file_to_write,
    help="Also write one page of HTML that needs nothing else.",
)
text_option = click.option(
    "--text",
    default="code",
    show_default=True,
    metavar="FILE",
    callback=text_argument,
    help="What the model reads: a UTF-8 file, or prose, code or topics (installed texts).",
)


def selector_option(default: str | None, start: str = "") -> Callable[[Command], Command]:
    """--selector.

    Args:
        default: Of the command; ``None`` where it takes ``--quality`` beside it.
        start: How its help begins.
    """
    return click.option(
        "--selector",
        default=default,
        show_default=default is not None,
        metavar="SELECTOR",
        callback=only_selector_argument if default is not None else selector_argument,
        help=f"{start}{', '.join(SELECTOR_NAMES)}, a calibration (*.json) or such as "
        "'UniSparse(top_p=0.95)'.",
    )


SPARSE_OPTIONS = (
    text_option,
    selector_option("default"),
    click.option(
        "--quality",
        metavar="Q",
        callback=setting_argument,
        help="A setting of the dial instead: fast, balanced, high or a number.",
    ),
    *LAYER_OPTIONS,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """An optimized model and what it is to read.

    Attributes:
        name: As the user gave it.
        loaded: The model, its tokenizer and where it runs.
        input_ids: int64 [1, S].
        setting: What the selector is called.
        settings: Selector, lengths and text in words.
        source: Where settings come from that were saved with the model; ``None`` without any.
    """

    name: str
    loaded: LoadedModel
    input_ids: Tensor
    setting: str
    settings: dict[str, str]
    source: str | None

    @property
    def device(self) -> str:
        """The device in words."""
        from ..evaluation import describe_device

        return describe_device(self.loaded.device)


def with_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Adds options to a command, shown in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def create_subject(
    model: str,
    *,
    progress: Progress,
    allow_download: bool,
    device: str | None,
    tokens: int | None,
    text: str,
    selector: str,
    quality: str | None,
    min_length: int | None,
    dense_layers: tuple[int, ...],
    backend: str,
) -> Subject:
    """Loads a model, optimizes it and tokenizes its prompt.

    Settings that were saved with it count where no option says otherwise.
    """
    from ..optimization import optimize
    from .models import check_backend, check_layers, load_model, stated_context
    from .prompts import check_tokens, create_input_ids
    from .saved import check_saved, merge_saved
    from .selectors import describe, parse_quality, parse_selector

    chosen = parse_selector(selector) if quality is None else parse_quality(quality)
    check_tokens(tokens, stated_context(model))
    check_layers(model, dense_layers)
    check_backend(backend, device)
    check_saved(model, device=device)
    progress.show(f"load {model}")
    loaded = load_model(model, allow_download=allow_download, device=device)
    progress.show(f"tokenize {text}")
    input_ids = create_input_ids(loaded, text, tokens)
    merged = merge_saved(
        loaded.model,
        device=device,
        min_length=min_length,
        dense_layers=dense_layers,
        backend=backend,
    )
    chosen = merged.selector or chosen
    min_length, dense_layers, backend = merged.min_length, merged.dense_layers, merged.backend
    with wrong_arguments():
        optimize(
            loaded.model,
            chosen,
            min_length=min_length,
            dense_layers=dense_layers,
            backend=backend,
        )
    settings = {} if merged.source is None else {SOURCE: merged.source}
    settings |= {
        "selector": describe(chosen, selector, input_ids.shape[1]),
        "sparse from": "what the cost model predicts to be faster"
        if min_length is None
        else f"{counted(min_length, 'key')} (min_length)",
        "prompt": f"{counted(input_ids.shape[1], 'token')} of {text}",
        "backend": backend,
    }
    if dense_layers:
        settings["dense layers"] = ", ".join(map(str, dense_layers))
    return Subject(
        name=model,
        loaded=loaded,
        input_ids=input_ids,
        setting=merged.name or quality or selector,
        settings=settings,
        source=merged.source,
    )


__all__ = [
    "MODEL_OPTIONS",
    "SPARSE_OPTIONS",
    "Subject",
    "create_subject",
    "json_option",
    "min_length_option",
    "quiet_option",
    "with_options",
]
