"""The benchmarks of masks and of padding: what they give a model, what they say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import masked, padding
from bench.registry import describe


@pytest.mark.parametrize("case", masked.CASES)
def test_masks_of_calls_and_of_models_hide_the_same(case: str) -> None:
    tokens, batch = 32, 3
    ids, mask = masked.call_mask(case, tokens, batch, "cpu")
    row, key = torch.arange(tokens)[:, None], torch.arange(tokens)
    expected = (key <= row).expand(batch, 1, tokens, tokens)
    given = masked.model_inputs(case, tokens, batch, 256, "cpu")
    assert given["input_ids"].shape == ids.shape == (batch, tokens)
    assert set(given) - {"input_ids"} <= {"attention_mask", "position_ids"}
    if "attention_mask" in given:
        expected = expected & given["attention_mask"].bool()[:, None, None]
    if case == "padded":
        assert (~expected).any(-1).any()
        assert len({tuple(row.tolist()) for row in given["attention_mask"]}) == batch
    if case == "documents":
        documents = (given["position_ids"].diff(prepend=torch.zeros(batch, 1).long()) < 0).cumsum(
            -1
        )
        assert documents.amax() == masked.DOCUMENTS - 1
        expected = expected & (documents[:, :, None] == documents[:, None])[:, None]
    if case == "window":
        expected = expected & (row - key < tokens // masked.WINDOW_SHARE)
    assert (mask is None) == (case == "none")
    if mask is not None:
        assert mask(ids).expand_as(expected).equal(expected)


@pytest.mark.usefixtures("slow_kernels")
def test_a_small_model_runs_and_its_file_has_tables(tmp_path: Path) -> None:
    output = tmp_path / "masked-cpu.json"
    arguments = ["--small", "--parts", "models,host", "--cases", "ones", "--modes", "eager"]
    options = ["--tokens", "600", "--layers", "2", "--density", "0.5", "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked, "HOST_CALLS", 1)
        patch.setattr(masked, "HOST_TOKENS", 256)
        patch.setattr(torch, "compile", lambda model, **_: model)
        masked.main([*arguments, *options])
    result = json.loads(output.read_text())
    assert [row.get("variant") for row in result["rows"]] == ["dense", "forced", "default", None]
    assert not any("errors" in row for row in result["rows"])
    dense, forced, default, host = result["rows"]
    assert forced["logits_relative_error"] > 1e-4
    assert 0.3 < forced["density"] < 1 == default["density"]
    assert (forced["sparse_calls"], default["sparse_calls"]) == (2, 0)
    # Default settings leave so short a prompt alone.
    assert dense["logits_relative_error"] == default["logits_relative_error"] == 0
    assert host["sparse_eager_us"] > 0
    assert host["sparse_further_us"] is not None
    text = describe({output.name: result})
    assert "| ones | 600 | 1 | eager | forced |" in text
    assert f"{forced['ms'] / dense['ms']:.3f}" in text


def test_padding_is_compared_with_the_same_prompts_alone() -> None:
    def row(text: str, before: int, kl: float) -> dict[str, Any]:
        return {"text": text, "seed": 0, "padding": before, "density": 0.5, "kl": kl}

    result = {
        "benchmark": "padding",
        "model": "a model",
        "weights": "real",
        "tokens": 64,
        "judged": 8,
        "dtype": "float32",
        "device": "CPU",
        "command": ["python"],
        "rows": [row("a", 0, 0.1), row("a", 3, 0.2), row("b", 0, 0.3), row("b", 3, 0.6)],
    }
    text = padding.describe(result, "padding.json")
    assert "| 0 | 0.500 | 0.2000 | +0.0000 | 0.0000 |" in text
    assert "| 3 | 0.500 | 0.4000 | +0.2000 | 0.1000 |" in text
