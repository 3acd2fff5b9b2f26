"""Tasks in the manner of RULER (arXiv 2404.06654): long prompts with known answers.

Wording, numbers and scoring follow the group ``ruler`` of lm-evaluation-harness; ``niah_single``
is its ``niah_single_2``, ``niah_multikey`` its ``niah_multikey_1``. What differs: the needles lie
in an installed text or in one's own, words have four to eight letters, no other word of ``cwe``
contains an answer, and ``tokens`` is the length of the prompt, its answer not counted.
"""

from __future__ import annotations

import math
import random
import string
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch

from .needle import Tokenizer
from .texts import TextName, draw_excerpt, load_text

TaskName = Literal[
    "niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"
]
TASK_NAMES: tuple[TaskName, ...] = get_args(TaskName)

_CHARACTERS_PER_TOKEN = 8  # more than any of the texts needs
_WORD = "[a-z]{4,8}"
_NEEDLES = 4  # of all niah tasks but niah_single
_DEPTHS = tuple(step / 39 for step in range(40))

_VT_HOPS = 4
_VT_NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_VT_EXAMPLE_LINES = 10

_CWE_ANSWERS = 10
_CWE_LONG = 4096  # tokens from which words repeat more often

_FWE_ANSWERS = 3
_FWE_LETTERS = 6
_FWE_TOKENS_PER_WORD = 50  # one distinct word for so many tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSample:
    """A prompt and what a right answer contains.

    Attributes:
        name: The task.
        input_ids: ``[1, S]`` int64; the answer is the only thing missing.
        answers: Each must be in the answer.
        max_new_tokens: How long the answer may be.
    """

    name: TaskName
    input_ids: torch.Tensor
    answers: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draft:
    """A prompt of any size from ``smallest`` to ``largest``; tokens grow with the size."""

    render: Callable[[int], str]
    smallest: int
    largest: int
    answers: tuple[str, ...]
    max_new_tokens: int


def build_task(
    name: TaskName,
    tokenizer: Tokenizer,
    *,
    tokens: int,
    seed: int,
    text: TextName = "prose",
    haystack: str | None = None,
    depth: float | None = None,
) -> TaskSample:
    """Returns the sample of a seed, the longest that has at most ``tokens`` tokens.

    Args:
        name: One of ``TASK_NAMES``.
        tokenizer: The model's own.
        tokens: What the prompt may be long, without the answer.
        seed: Picks all that is random.
        text: What the needles of ``niah_*`` lie in; the other tasks make their own text.
        haystack: A text of one's own for that, from its beginning, repeated where it is too short.
        depth: Where the needle asked for lies, 0 (start) to 1 (end), moved to the nearest end of
            a sentence or of the text; for ``niah_single`` and ``niah_multikey``. Picked by the
            seed when omitted.

    Raises:
        ValueError: If there is no such task, ``depth`` is outside [0, 1] or not for this task, or
            ``tokens`` is too small for the task or too large for its text.
    """
    if name not in TASK_NAMES:
        raise ValueError(f"name must be one of {', '.join(TASK_NAMES)}, got {name!r}")
    if depth is not None and name not in ("niah_single", "niah_multikey"):
        raise ValueError(f"depth must be None for task {name!r}, got {depth}")
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must be in [0, 1], got {depth}")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    if haystack is not None and not haystack.split():
        raise ValueError("haystack must hold at least one word, got none")

    if name == "vt":
        draft = _draft_vt(tokens, seed)
    elif name == "cwe":
        draft = _draft_cwe(tokens, seed)
    elif name == "fwe":
        draft = _draft_fwe(tokens, seed)
    else:
        words = _haystack_words(text, haystack, tokens, seed)
        draft = _draft_niah(name, words, seed, depth)

    def encode(size: int) -> list[int]:
        return tokenizer.encode(draft.render(size), add_special_tokens=False)

    shortest = len(encode(draft.smallest))
    if tokens < shortest:
        raise ValueError(f"tokens must be at least {shortest} for task {name!r}, got {tokens}")
    sizes = range(draft.smallest, draft.largest + 1)
    size = sizes[bisect_right(sizes, tokens, key=lambda size: len(encode(size))) - 1]
    ids = encode(size)
    if size == draft.largest and len(ids) < tokens:
        raise ValueError(f"tokens must be at most {len(ids)} for task {name!r}, got {tokens}")
    return TaskSample(
        name=name,
        input_ids=torch.tensor([ids]),
        answers=draft.answers,
        max_new_tokens=draft.max_new_tokens,
    )


def score(sample: TaskSample, answer_text: str) -> float:
    """The share of the answers that ``answer_text`` contains, whatever the case."""
    found = [answer.lower() in answer_text.lower() for answer in sample.answers]
    return sum(found) / len(found)


# Needles in a text.


def _haystack_words(text: TextName, haystack: str | None, tokens: int, seed: int) -> list[str]:
    """Words for a prompt of ``tokens``, and more."""
    if haystack is not None:
        words = haystack.split()
        return (words * -(-tokens // len(words)))[:tokens]
    whole = _text(text)
    characters = min(len(whole), tokens * _CHARACTERS_PER_TOKEN)
    return draw_excerpt(whole, characters=characters, seed=seed).split()


def _draft_niah(name: TaskName, words: list[str], seed: int, depth: float | None) -> _Draft:
    rng = random.Random(f"niah {seed}")
    keys = _NEEDLES if name in ("niah_multikey", "niah_multiquery") else 1
    values = _NEEDLES if name == "niah_multivalue" else 1
    asked_for = _NEEDLES if name == "niah_multiquery" else 1
    adjectives = rng.sample(_words("adjective"), _NEEDLES)
    nouns = rng.sample(_words("noun"), _NEEDLES)
    numbers = [str(n) for n in rng.sample(range(10**6, 10**7), _NEEDLES)]
    names = [f"{adjective}-{noun}" for adjective, noun in zip(adjectives, nouns, strict=True)]

    # The first keys are those asked for.
    needles = [
        f"One of the special magic numbers for {names[i % keys]} is: {numbers[i]}."
        for i in range(keys * values)
    ]
    depths = rng.sample(_DEPTHS, len(needles))
    if depth is not None:
        depths[0] = depth

    queries = names[0] if asked_for == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
    asked = f"for {queries} mentioned in the provided text"
    if values * asked_for == 1:
        start = "A special magic number is hidden within the following text."
        kind, question, answer = "number", "What is the", "is"
    else:
        start = "Some special magic numbers are hidden within the following text."
        kind, question, answer = "numbers", "What are all the", "are"

    def render(size: int) -> str:
        haystack = " ".join(_hide(needles, depths, words[:size]))
        return (
            f"{start} Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
            f"{haystack}\n"
            f"{question} special magic {kind} {asked}? The special magic {kind} {asked} {answer}"
        )

    return _Draft(
        render=render,
        smallest=1,
        largest=len(words),
        answers=tuple(numbers[: values * asked_for]),
        max_new_tokens=128,
    )


def _hide(needles: Sequence[str], depths: Sequence[float], words: Sequence[str]) -> list[str]:
    """The words with every needle at the end of a sentence close to its depth."""
    ends = [i + 1 for i, word in enumerate(words) if word.endswith((".", "?", "!"))]
    places = [0, *ends, len(words)]
    at = [min(places, key=lambda place: abs(place - d * len(words))) for d in depths]
    hidden = list(words)
    for place, needle in sorted(zip(at, needles, strict=True), reverse=True):
        hidden.insert(place, needle)
    return hidden


# Variable tracking: one chain of assignments between lines of noise.


def _draft_vt(tokens: int, seed: int) -> _Draft:
    rng = random.Random(f"vt {seed}")
    noise = len(_VT_NOISE)
    example, names = _render_vt(rng, _VT_EXAMPLE_LINES * noise, letters=3)
    start = f"{example} {' '.join(names)}\n\n"
    state = rng.getstate()

    def draw(size: int) -> tuple[str, list[str]]:
        rng.setstate(state)
        return _render_vt(rng, size, letters=5)

    smallest = (_VT_HOPS + 1) * noise
    return _Draft(
        render=lambda size: start + draw(size)[0],
        smallest=smallest,
        largest=max(smallest, tokens // 3),  # a sentence has at least 4 tokens
        answers=tuple(draw(smallest)[1]),
        max_new_tokens=30,
    )


def _render_vt(rng: random.Random, sentences: int, *, letters: int) -> tuple[str, list[str]]:
    """A prompt with so many sentences of noise, and its variables in order."""
    words = _random_words(rng, string.ascii_uppercase, letters)
    names = [next(words) for _ in range(_VT_HOPS + 1)]
    value = rng.randrange(10_000, 100_000)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {names[i + 1]} = VAR {names[i]}" for i in range(_VT_HOPS)]

    per_line = len(_VT_NOISE)
    lines = [
        " ".join(_VT_NOISE[: min(per_line, sentences - first)])
        for first in range(0, sentences, per_line)
    ]
    places = sorted(rng.sample(range(len(lines)), len(chain)))
    for place, assignment in reversed(list(zip(places, chain, strict=True))):
        lines.insert(place, assignment)
    context = "\n".join(lines)
    prompt = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{context}\n"
        f"Question: Find all variables that are assigned the value {value} in the text above. "
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:"
    )
    return prompt, names


# Common words: some words of a numbered list come more often than the others.


def _draft_cwe(tokens: int, seed: int) -> _Draft:
    rng = random.Random(f"cwe {seed}")
    often, seldom, example_often, example_seldom, example_others = (
        (30, 3, 10, 3, 30) if tokens >= _CWE_LONG else (6, 1, 3, 1, 10)
    )
    words = list(_words("noun", "adjective", "verb"))
    rng.shuffle(words)
    answers, words = _take_apart(words, _CWE_ANSWERS)
    example_answers, words = _take_apart(words, _CWE_ANSWERS)
    example_rest, others = words[:example_others], words[example_others:]

    example = _render_cwe(rng, example_answers * example_often + example_rest * example_seldom)
    start = f"{example} {_number(example_answers)}\n"
    rest = [word for word in others for _ in range(seldom)]
    state = rng.getstate()

    def render(size: int) -> str:
        rng.setstate(state)
        return start + _render_cwe(rng, answers * often + rest[:size])

    return _Draft(
        render=render,
        smallest=1,
        largest=len(rest),
        answers=tuple(answers),
        max_new_tokens=120,
    )


def _render_cwe(rng: random.Random, entries: list[str]) -> str:
    rng.shuffle(entries)
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{_number(entries)}\n"
        "Question: What are the 10 most common words in the above list? "
        "Answer: The top 10 words that appear most often in the list are:"
    )


def _number(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def _take_apart(words: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """The first ``count`` words of which none contains another, and the words without them."""
    taken: list[str] = []
    for word in words:
        if len(taken) < count and not any(word in other or other in word for other in taken):
            taken.append(word)
    return taken, [word for word in words if not any(other in word for other in taken)]


# Frequent words: made-up words, the k-th most frequent one in proportion to 1 / k^2.


def _draft_fwe(tokens: int, seed: int) -> _Draft:
    rng = random.Random(f"fwe {seed}")
    count = max(_FWE_ANSWERS + 2, tokens // _FWE_TOKENS_PER_WORD)
    coded = _random_words(rng, string.ascii_lowercase, _FWE_LETTERS)
    ranked = ["..."] + [next(coded) for _ in range(count - 1)]
    state = rng.getstate()

    def render(size: int) -> str:
        rng.setstate(state)
        words = [
            word
            for rank, word in enumerate(ranked, start=1)
            for _ in range(int(size * _fwe_share(rank)))
        ]
        rng.shuffle(words)
        return (
            "Read the following coded text and track the frequency of each coded word. "
            f"Find the three most frequently appeared coded words. {' '.join(words)}\n"
            "Question: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text? "
            "Answer: According to the coded text above, "
            "the three most frequently appeared words are:"
        )

    last = _FWE_ANSWERS + 1  # the dots come first
    smallest = math.ceil(1 / (_fwe_share(last) - _fwe_share(last + 1)))  # the last leads by one
    return _Draft(
        render=render,
        smallest=smallest,
        largest=max(smallest, 2 * tokens),  # more dots than tokens
        answers=tuple(ranked[1:last]),
        max_new_tokens=50,
    )


def _fwe_share(rank: int) -> float:
    """Of the zeta distribution with exponent 2."""
    return 6 / (math.pi * rank) ** 2


# Words and texts.


def _random_words(rng: random.Random, alphabet: str, letters: int) -> Iterator[str]:
    """Words of random letters, every one another."""
    seen: set[str] = set()
    while True:
        word = "".join(rng.choices(alphabet, k=letters))
        if word not in seen:
            seen.add(word)
            yield word


@cache
def _words(*categories: str) -> tuple[str, ...]:
    from wonderwords import RandomWord

    words = RandomWord(enhanced_prefixes=False)
    return tuple(sorted(set(words.filter(include_categories=categories, regex=_WORD))))


@cache
def _text(name: TextName) -> str:
    return load_text(name)
