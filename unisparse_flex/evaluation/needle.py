"""A prompt of an exact number of tokens, with a needle in it and a question about the needle."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import torch

from .texts import TextName, draw_excerpt, load_text

_WORD = "[a-z]{4,8}"
_CHARACTERS_PER_TOKEN = 6  # more than any of the texts needs
_LINE_END_WINDOW = 64  # tokens on either side of the depth asked for


class Tokenizer(Protocol):
    """The two methods of a Hugging Face tokenizer that a prompt needs."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of ``text``."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """Returns the text of ``token_ids``."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Needle:
    """A fact that a model cannot know, in the words of RULER (arXiv 2404.06654).

    Attributes:
        key: What the number belongs to, ``"{adjective}-{noun}"``.
        value: Seven digits.
    """

    key: str
    value: str

    @property
    def sentence(self) -> str:
        """What is hidden in the text."""
        return f"The special magic number for {self.key} is {self.value}."

    @property
    def question(self) -> str:
        """What ends the prompt; the value is the only thing missing."""
        return (
            f"Question: What is the special magic number for {self.key}?\n"
            f"Answer: The special magic number for {self.key} is"
        )

    def is_in(self, answer: str) -> bool:
        """Whether ``answer`` states the value."""
        return self.value in answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Token ids and where their parts lie.

    Attributes:
        input_ids: ``[1, S]`` int64.
        needle: What is hidden.
        needle_span: Tokens ``[start, stop)`` of the needle's sentence.
        question_start: First token of the question; all before it is text and needle.
    """

    input_ids: torch.Tensor
    needle: Needle
    needle_span: tuple[int, int]
    question_start: int

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return self.input_ids.shape[-1]


def draw_needle(*, seed: int) -> Needle:
    """Returns the needle of a seed: two words of wonderwords and seven digits."""
    from wonderwords import RandomWord

    rng = random.Random(seed)
    words = RandomWord(enhanced_prefixes=False)
    adjectives = words.filter(include_categories=["adjective"], regex=_WORD)
    nouns = words.filter(include_categories=["noun"], regex=_WORD)
    key = f"{rng.choice(adjectives)}-{rng.choice(nouns)}"
    return Needle(key=key, value=str(rng.randrange(1_000_000, 10_000_000)))


def build_prompt(
    tokenizer: Tokenizer, *, text: TextName, tokens: int, depth: float, seed: int
) -> Prompt:
    """Returns a prompt of exactly ``tokens`` tokens: text, needle, text, question.

    Args:
        tokenizer: The model's own.
        text: Which text surrounds the needle.
        tokens: Length of the prompt, question included.
        depth: Where the needle goes, 0 (start) to 1 (just before the question); moved to the
            nearest end of a line.
        seed: Picks the needle and the excerpt.

    Raises:
        ValueError: If ``depth`` is outside [0, 1] or ``tokens`` cannot hold needle and question.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must be in [0, 1], got {depth}")
    needle = draw_needle(seed=seed)
    needle_ids = tokenizer.encode(f"\n{needle.sentence}\n", add_special_tokens=False)
    question_ids = tokenizer.encode(f"\n\n{needle.question}", add_special_tokens=False)
    length = tokens - len(needle_ids) - len(question_ids)
    if length < 1:
        shortest = len(needle_ids) + len(question_ids) + 1
        raise ValueError(f"tokens must be at least {shortest} for this needle, got {tokens}")

    excerpt = draw_excerpt(load_text(text), characters=length * _CHARACTERS_PER_TOKEN, seed=seed)
    text_ids = tokenizer.encode(excerpt, add_special_tokens=False)[:length]
    at = _nearest_line_end(tokenizer, text_ids, round(depth * length))
    ids = [*text_ids[:at], *needle_ids, *text_ids[at:], *question_ids]
    if len(ids) != tokens:
        raise ValueError(f"tokens must be at most {len(ids)} for text {text!r}, got {tokens}")
    return Prompt(
        input_ids=torch.tensor([ids]),
        needle=needle,
        needle_span=(at, at + len(needle_ids)),
        question_start=tokens - len(question_ids),
    )


def _nearest_line_end(tokenizer: Tokenizer, ids: list[int], position: int) -> int:
    """The split closest to ``position`` that follows a line break, or ``position`` itself."""
    low, high = max(1, position - _LINE_END_WINDOW), min(len(ids), position + _LINE_END_WINDOW)
    breaks = [i for i in range(low, high) if tokenizer.decode(ids[i - 1 : i]).endswith("\n")]
    if position in (0, len(ids)):
        return position
    return min(breaks, key=lambda i: abs(i - position), default=position)
