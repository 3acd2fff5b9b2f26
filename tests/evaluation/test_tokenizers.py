"""Tokenizers out of GGUF files: one that splits words into letters is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unisparse_flex.evaluation import load_gguf_tokenizer, validate_gguf_tokenizer
from unisparse_flex.evaluation.model import PROBE


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


def test_a_tokenizer_beside_the_file_is_used_in_its_place(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = sorted(set(PROBE.split()))
    numbers = {word: number for number, word in enumerate(["<unk>", *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    # The file itself is not opened.
    found = load_gguf_tokenizer(tmp_path / "model.gguf")
    assert found("the city")["input_ids"] == [numbers["the"], numbers["city"]]
