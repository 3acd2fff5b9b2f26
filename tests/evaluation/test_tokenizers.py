"""Tokenizers out of GGUF files: one that splits words into letters is refused."""

from __future__ import annotations

from typing import Any

import pytest

from unisparse_flex.evaluation import validate_gguf_tokenizer


def tokenizer(split: Any) -> Any:
    return lambda text, add_special_tokens: {"input_ids": split(text)}


def test_words_are_one_token_or_two() -> None:
    validate_gguf_tokenizer(tokenizer(str.split))
    validate_gguf_tokenizer(tokenizer(lambda text: text.split() * 2))


def test_a_tokenizer_that_splits_words_into_letters_is_refused_by_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    with pytest.raises(ValueError, match=r"got \d+ tokens for 19 words from transformers 5\.17\.0"):
        validate_gguf_tokenizer(tokenizer(list))
