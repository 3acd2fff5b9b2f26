"""What a model reads: a text file or a text that is installed, as token ids."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from ..counted import counted
from ..evaluation import TEXT_NAMES, LoadedModel, draw_excerpt, load_text
from .arguments import check_text
from .failures import wrong_content
from .models import context_length

DEFAULT_TOKENS = 4096
# More than any of the installed texts needs for a token.
CHARACTERS_PER_TOKEN = 6


def read_text(name: str, *, characters: int) -> str:
    """Returns a file's text, or an excerpt of an installed text of that many characters.

    Args:
        name: A path, or a name in `TEXT_NAMES`; a file of such a name is ``./prose``.
        characters: Length of the excerpt, at most; a file is read whole.
    """
    check_text(name)
    for known in TEXT_NAMES:
        if name == known:
            text = load_text(known)
            return draw_excerpt(text, characters=min(characters, len(text)), seed=0)
    with wrong_content(f"read {name} as UTF-8"):
        return Path(name).read_text(encoding="utf-8")


def check_tokens(tokens: int | None, limit: int | None) -> None:
    """Raises where a prompt is asked for that is longer than the model's context."""
    if tokens is not None and limit is not None and tokens > limit:
        raise click.UsageError(
            f"--tokens must be at most the model's context, {limit}, got {tokens}"
        )


def create_input_ids(loaded: LoadedModel, text: str, tokens: int | None) -> Tensor:
    """Returns the first tokens of a text on the model's device, int64 [1, S].

    Args:
        loaded: The model and its tokenizer.
        text: See `read_text`.
        tokens: How many; by default 4096, or all there are and the model takes, if fewer.

    Raises:
        click.ClickException: The text or the model's context is shorter than asked for.
    """
    limit = context_length(loaded.model)
    check_tokens(tokens, limit)
    wanted = tokens or min(DEFAULT_TOKENS, limit or DEFAULT_TOKENS)
    written = read_text(text, characters=wanted * CHARACTERS_PER_TOKEN)
    ids = loaded.tokenizer.encode(written, add_special_tokens=False, verbose=False)[:wanted]
    if not ids or (tokens is not None and len(ids) < tokens):
        raise click.UsageError(
            f"--tokens must be at most the {counted(len(ids), 'token')} of {text}, got {wanted}"
        )
    return torch.tensor([ids], device=loaded.device)


def model_inputs(model: Any, input_ids: Tensor) -> Mapping[str, Any]:
    """The token ids, and what keeps a prefill from holding more than it needs."""
    accepted = inspect.signature(model.forward).parameters
    sparing = {"use_cache": False, "logits_to_keep": 1}
    kept = {name: value for name, value in sparing.items() if name in accepted}
    return {"input_ids": input_ids, **kept}
