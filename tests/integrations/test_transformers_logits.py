"""``attn_implementation="unisparse"``: with every block kept, the logits and tokens of "sdpa"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from tests.api.reference import rmse
from tests.models.cells import in_float64
from tests.models.families import BY_NAME
from tests.models.family import EVERYTHING, SELECTOR, token_ids
from tests.models.modes import LENGTHS, MODES, padded_batch
from tests.models.replay import recorded, replayed
from unisparse_flex.integrations.deferred_mask import DeferredMask
from unisparse_flex.reports import record_attention

from .named import NAME, create, registered

FAMILIES = (
    *("Llama", "Mistral", "Gemma 3", "Qwen3", "Phi-3", "GPT-NeoX", "Mixtral", "DeepSeek-V3"),
    *("BERT", "ModernBERT", "ViT", "SigLIP", "Whisper", "T5", "BART"),
)
LANGUAGE_MODELS = FAMILIES[:7]
EAGER = [
    (family, mode)
    for family in FAMILIES
    for mode in BY_NAME[family].modes
    if MODES[mode].through == "eager"
]
# Sparse calls of one prefill, where it is not one for each of two layers.
SPARSE = {"Whisper": 6, "T5": 6, "BART": 6}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def everything() -> Iterator[str]:
    with registered(EVERYTHING) as name:
        yield name


@pytest.fixture
def few() -> Iterator[str]:
    with registered(SELECTOR) as name:
        yield name


@torch.no_grad()
def run(model: Any, family: str, mode: str) -> Tensor:
    return MODES[mode].run(model, BY_NAME[family].inputs())


def test_the_families_are_at_least_six_and_some_have_windows() -> None:
    assert len(FAMILIES) >= 6
    assert {"Mistral", "Gemma 3"} <= {f for f, mode in EAGER if "padding" in mode}


@pytest.mark.parametrize(("family", "mode"), EAGER)
def test_with_every_block_kept_it_computes_what_sdpa_does(
    everything: str, family: str, mode: str
) -> None:
    model = create(family, everything)
    with record_attention(model) as calls:
        run(model, family, mode)
    sparse = [call for call in calls if call.decision == "sparse"]
    chunks = 4 if mode == "chunked prefill" else 1
    assert len(sparse) == SPARSE.get(family, 2) * chunks
    assert all(call.density == 1.0 for call in sparse)
    output = run(model, family, mode)
    assert rmse(output, run(BY_NAME[family].create(), family, mode)) < 1e-6


@pytest.mark.parametrize(("family", "mode"), EAGER)
def test_it_attends_to_the_selected_blocks_and_nothing_else(
    few: str, family: str, mode: str
) -> None:
    """The oracle is the sdpa model in float64, its calls made by definition over the same blocks.

    It also compares what every query sees, as a mask or as a formula.
    """
    model, untouched = create(family, few), BY_NAME[family].create()
    output, calls = recorded(lambda: run(model, family, mode))

    def by_definition(model: Any, dtype: torch.dtype) -> Tensor:
        inputs = BY_NAME[family].inputs()
        exact = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.no_grad():
            return replayed(lambda: MODES[mode].run(model, exact), calls, SELECTOR)

    exact = by_definition(in_float64(untouched), torch.float64)
    plain = by_definition(untouched, torch.float32)
    assert any(call.selection is not None for call in calls)
    assert rmse(output, exact) <= 3 * rmse(plain, exact)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}]
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_generation_gives_the_tokens_of_sdpa(
    everything: str, family: str, padded: bool, options: dict[str, Any]
) -> None:
    ids = token_ids()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs = padded_batch("left") if padded else inputs
    arguments = {**inputs, "max_new_tokens": 8, "do_sample": False, **options}
    tokens = create(family, everything).generate(**arguments)
    assert tokens.equal(BY_NAME[family].create().generate(**arguments))
    assert tokens.shape[1] == ids.shape[1] + 8


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_padded_row_computes_what_the_row_alone_does(
    everything: str, family: str, side: str
) -> None:
    model, batch = create(family, everything), padded_batch(side)
    with torch.no_grad():
        logits = model(**batch).logits
        for row in range(len(LENGTHS)):
            real = batch["attention_mask"][row].bool()
            alone = model(input_ids=batch["input_ids"][row, real][None]).logits[0]
            assert rmse(logits[row, real], alone) < 2e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_attention_function_alone_would_attend_to_padding(everything: str, side: str) -> None:
    """What the mask function is for: transformers makes no mask for a name without one."""
    mapping = AttentionInterface._global_mapping
    with mock.patch.dict(mapping, {"no_mask_function": mapping[everything]}):
        lost = create("Llama", "no_mask_function")
        kept, batch = create("Llama", everything), padded_batch(side)
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            expected = BY_NAME["Llama"].create()(**batch).logits[real]
            assert rmse(kept(**batch).logits[real], expected) < 1e-6
            assert (rmse(lost(**batch).logits[real], expected) > 0.1) == (side == "left")
        # Padding on the right is hidden by causality; an encoder has none.
        bert = create("BERT", "no_mask_function")
        with torch.no_grad():
            expected = BY_NAME["BERT"].create()(**padded_batch("right"))[0]
            assert rmse(bert(**padded_batch("right"))[0], expected) > 0.1


@pytest.mark.parametrize(
    ("family", "mode"),
    [(family, mode) for family, mode in EAGER if family in LANGUAGE_MODELS and "beam" not in mode],
)
def test_no_mask_is_computed_for_a_sparse_call(few: str, family: str, mode: str) -> None:
    model = create(family, few)
    expected = run(model, family, mode)
    with mock.patch.object(DeferredMask, "compute", side_effect=AssertionError("computed")):
        assert run(model, family, mode).equal(expected)


@pytest.mark.parametrize("mode", ["forward, left padding", "chunked prefill"])
@pytest.mark.parametrize("family", ["Llama", "Gemma 3"])
def test_a_dense_call_computes_exactly_what_sdpa_does(family: str, mode: str) -> None:
    with registered(SELECTOR, min_length=10_000):
        model = create(family, NAME)
        output = run(model, family, mode)
    assert output.equal(run(BY_NAME[family].create(), family, mode))
