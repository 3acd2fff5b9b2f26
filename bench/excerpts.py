"""Excerpts of the installed texts, as long as a benchmark asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from unisparse_flex.evaluation import LoadedModel, TextName, draw_excerpt, load_text

# More than any of the installed texts needs for a token.
CHARACTERS_PER_TOKEN = 6


def encode_excerpt(
    loaded: LoadedModel,
    text: TextName,
    *,
    tokens: int,
    seed: int,
    characters_per_token: int = CHARACTERS_PER_TOKEN,
) -> Tensor:
    """Returns exactly so many tokens of an excerpt that ``seed`` picks, int64 [1, tokens].

    Args:
        loaded: Whose tokenizer.
        text: Which text.
        tokens: How many.
        seed: Picks the excerpt, together with its length in characters.
        characters_per_token: Of the excerpt.

    Raises:
        ValueError: The text has fewer.
    """
    characters = tokens * characters_per_token
    excerpt = draw_excerpt(load_text(text), characters=characters, seed=seed)
    ids = loaded.tokenizer.encode(excerpt)[:tokens]
    if len(ids) < tokens:
        raise ValueError(f"--tokens must be at most {len(ids)} for {text}, got {tokens}")
    return torch.tensor([ids], device=loaded.device)
