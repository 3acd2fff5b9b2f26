"""Options that several commands share, and the model that they describe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
from torch import Tensor

from ..evaluation import LoadedModel, describe_device
from ..optimization import optimize
from ..passes.calls import BACKENDS
from ..progress import Progress
from .failures import wrong_arguments
from .models import load_model
from .prompts import create_input_ids
from .selectors import describe, parse_selector

Command = Callable[..., Any]

json_option = click.option(
    "as_json", "--json", is_flag=True, help="Print JSON and nothing else to standard output."
)
quiet_option = click.option(
    "--quiet", "-q", is_flag=True, help="Show no progress on standard error."
)
MODEL_OPTIONS = (
    click.option(
        "--allow-download",
        is_flag=True,
        help="Let MODEL be a name on the Hugging Face hub, downloaded if need be.",
    ),
    click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:N.  [default: GPU if any]"),
    click.option(
        "--tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help="Length of the prompt.  [default: 4096, or the text's or the model's if less]",
    ),
)
SPARSE_OPTIONS = (
    click.option(
        "--text",
        default="code",
        show_default=True,
        metavar="FILE",
        help="What the model reads: a UTF-8 file, or prose, code or topics (installed texts).",
    ),
    click.option(
        "--selector",
        default="default",
        show_default=True,
        metavar="SELECTOR",
        help="default, paper, a calibration (*.json) or such as 'UniSparse(top_p=0.95)'.",
    ),
    click.option(
        "--dense-layers",
        metavar="I,J,...",
        default="",
        help="Layers that stay dense, negative ones from the end.",
    ),
    click.option(
        "--backend",
        type=click.Choice(BACKENDS),
        default="auto",
        show_default=True,
        help="Kernel on CUDA.",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """An optimized model and what it is to read.

    Attributes:
        name: As the user gave it.
        loaded: The model, its tokenizer and where it runs.
        input_ids: int64 [1, S].
        settings: Selector, lengths and text in words.
    """

    name: str
    loaded: LoadedModel
    input_ids: Tensor
    settings: dict[str, str]

    @property
    def device(self) -> str:
        """The device in words."""
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
    min_length: int | None,
    dense_layers: str,
    backend: str,
) -> Subject:
    """Loads a model, optimizes it and tokenizes its prompt."""
    chosen = parse_selector(selector)
    with wrong_arguments():
        layers = [int(part) for part in dense_layers.split(",") if part]
    progress.show(f"load {model}")
    loaded = load_model(model, allow_download=allow_download, device=device)
    progress.show(f"tokenize {text}")
    input_ids = create_input_ids(loaded, text, tokens)
    with wrong_arguments():
        optimize(loaded.model, chosen, min_length=min_length, dense_layers=layers, backend=backend)
    settings = {
        "selector": describe(chosen, selector),
        "sparse from": "what the cost model predicts to be faster"
        if min_length is None
        else f"{min_length} keys (min_length)",
        "prompt": f"{input_ids.shape[1]} tokens of {text}",
        "backend": backend,
    }
    if layers:
        settings["dense layers"] = ", ".join(map(str, layers))
    return Subject(name=model, loaded=loaded, input_ids=input_ids, settings=settings)


__all__ = [
    "MODEL_OPTIONS",
    "SPARSE_OPTIONS",
    "Subject",
    "create_subject",
    "json_option",
    "quiet_option",
    "with_options",
]
