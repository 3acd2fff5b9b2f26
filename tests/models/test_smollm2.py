"""SmolLM2-135M with its real weights: what optimizing does to the logits of 2048 real tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from unisparse_flex import UniSparse, explain, optimize, restore
from unisparse_flex.evaluation.model import LoadedModel, load_smollm2
from unisparse_flex.evaluation.needle import build_prompt

TOKENS = 2048
ROUNDING = 1e-5  # float32, thirty layers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_smollm2(torch.device("cpu"))


@pytest.fixture(scope="module")
def input_ids(smollm2: LoadedModel) -> Tensor:
    prompt = build_prompt(smollm2.tokenizer, text="topics", tokens=TOKENS, depth=0.5, seed=0)
    return prompt.input_ids


@pytest.fixture(scope="module")
def dense(smollm2: LoadedModel, input_ids: Tensor) -> Tensor:
    return logits(restore(smollm2.model), input_ids)


def logits(model: Any, input_ids: Tensor) -> Tensor:
    """[1, S, V] of one prefill."""
    with torch.inference_mode():
        return model(input_ids, use_cache=False).logits


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((output - expected).abs().max() / expected.abs().max())


def test_with_every_block_kept_eager_logits_are_dense(
    smollm2: LoadedModel, input_ids: Tensor, dense: Tensor
) -> None:
    model = optimize(smollm2.model, UniSparse(top_p=1.0), min_length=0)
    report = explain(model, input_ids, use_cache=False)
    assert [call.density for call in report.calls] == [1.0] * 30
    assert relative_error(logits(model, input_ids), dense) < ROUNDING


def test_the_default_selector_compiled_is_close_to_dense_but_not_dense(
    smollm2: LoadedModel, input_ids: Tensor, dense: Tensor
) -> None:
    torch._dynamo.reset()
    model = optimize(smollm2.model, min_length=0)
    eager = logits(model, input_ids)
    compiled: Any = torch.compile(model, fullgraph=True)
    output = logits(compiled, input_ids)
    assert relative_error(output, eager) < 1e-3
    assert relative_error(output, dense) > 1e-2
    divergence = torch.nn.functional.kl_div(
        output[0].log_softmax(-1), dense[0].log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert divergence < 0.1


def test_a_folder_of_the_dequantised_weights_is_the_same_model(
    smollm2: LoadedModel, input_ids: Tensor, dense: Tensor, tmp_path: Path
) -> None:
    smollm2.model.save_pretrained(tmp_path)
    smollm2.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert logits(again, input_ids).equal(dense)
    text = smollm2.tokenizer.decode(input_ids[0, :99])
    assert tokenizer(text).input_ids == smollm2.tokenizer(text).input_ids
    again.save_pretrained(tmp_path / "again")
