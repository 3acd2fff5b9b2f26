"""Padding of a batch: what stands in it, and how much of it other rows have, changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.api.reference import rmse
from unisparse_flex import optimize

from .families import BY_NAME
from .family import EVERYTHING, LENGTH, SELECTOR, token_ids
from .modes import LENGTHS, Inputs, padded_batch

CASES = [
    ("Llama", "left"),
    ("Llama", "right"),
    ("Gemma 3", "left"),
    ("Gemma 3", "right"),
    ("BERT", "right"),
    ("ModernBERT", "right"),
]

pytestmark = pytest.mark.usefixtures("one_thread")


def create(family: str, selector: Any = SELECTOR) -> Any:
    return optimize(BY_NAME[family].create(), selector, min_length=0)


def real_tokens(model: Any, batch: Inputs, row: int) -> Tensor:
    """Outputs of one row without its padding."""
    with torch.no_grad():
        return model(**batch)[0][row][batch["attention_mask"][row].bool()]


def with_other_padding(batch: Inputs) -> Inputs:
    """The same batch with tokens of another kind where it is padded."""
    real = batch["attention_mask"].bool()
    return {**batch, "input_ids": batch["input_ids"].where(real, token_ids(3, seed=9))}


@pytest.mark.parametrize("family", ["Llama", "Gemma 3"])
def test_what_stands_in_left_padding_changes_nothing(family: str) -> None:
    model, batch = create(family), padded_batch("left")
    for row in range(3):
        output = real_tokens(model, with_other_padding(batch), row)
        assert output.equal(real_tokens(model, batch, row))


@pytest.mark.parametrize("family", ["Llama", "Gemma 3"])
def test_what_stands_in_right_padding_reaches_only_the_block_where_it_begins(family: str) -> None:
    """A padded query sees keys, so it takes part in choosing the blocks of its own query block."""
    model, batch = create(family), padded_batch("right")
    for row, length in enumerate(LENGTHS):
        before = length if length == LENGTH else length // SELECTOR.block_size * SELECTOR.block_size
        output = real_tokens(model, with_other_padding(batch), row)[:before]
        assert output.equal(real_tokens(model, batch, row)[:before])


@pytest.mark.parametrize(("family", "side"), CASES)
def test_with_every_block_kept_what_stands_in_padding_changes_nothing(
    family: str, side: str
) -> None:
    model, batch = create(family, EVERYTHING), padded_batch(side)
    for row in range(3):
        output = real_tokens(model, with_other_padding(batch), row)
        assert rmse(output, real_tokens(model, batch, row)) < 1e-6


@pytest.mark.parametrize(("family", "side"), CASES)
def test_padding_one_row_never_changes_another(family: str, side: str) -> None:
    model, batch = create(family), padded_batch(side)
    mask = batch["attention_mask"].clone()
    cut = mask.shape[1] // 2
    mask[1, (slice(cut, None) if side == "right" else slice(cut))] = 0
    for row in (0, 2):
        expected = real_tokens(model, batch, row)
        output = real_tokens(model, {**batch, "attention_mask": mask}, row)
        assert rmse(output, expected) < 1e-6


@pytest.mark.parametrize(("family", "side"), CASES)
def test_with_every_block_kept_a_padded_row_is_the_row_alone(family: str, side: str) -> None:
    model, batch = create(family, EVERYTHING), padded_batch(side)
    plain = BY_NAME[family].create()
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        with torch.no_grad():
            alone = plain(input_ids=batch["input_ids"][row, real][None])[0][0]
        assert rmse(real_tokens(model, batch, row), alone) < 2e-6
