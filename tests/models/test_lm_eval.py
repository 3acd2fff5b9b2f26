"""lm-evaluation-harness takes an optimized model as it takes any other, on tasks of local files."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from unisparse_flex import UniSparse, is_optimized, optimize, restore
from unisparse_flex.evaluation.model import LoadedModel, load_smollm2
from unisparse_flex.evaluation.texts import draw_excerpt, load_text
from unisparse_flex.passes import DenseReason
from unisparse_flex.reports import record_attention

BLOCK = 16
COLOURS = ["red", "green", "blue"]
ROUNDING = 1e-5  # of log-likelihoods in float32, thirty layers deep

SHARED: dict[str, Any] = {"test_split": "test", "doc_to_text": "{{question}}"}
# One task for every kind of request.
CHOICE: dict[str, Any] = {
    **SHARED,
    "task": "choice",
    "output_type": "multiple_choice",
    "doc_to_choice": COLOURS,
    "doc_to_target": "{{colour}}",
}
ANSWER: dict[str, Any] = {
    **SHARED,
    "task": "answer",
    "output_type": "generate_until",
    "doc_to_target": "{{colour}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 3, "do_sample": False},
    "filter_list": [
        {"name": "strip", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
LIKELIHOOD: dict[str, Any] = {
    "test_split": "test",
    "task": "likelihood",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {
            "metric": "word_perplexity",
            "aggregation": "weighted_perplexity",
            "higher_is_better": False,
        }
    ],
}

pytestmark = pytest.mark.slow


class Scores(NamedTuple):
    """What the harness found: choices' log-likelihoods by document, answers and means."""

    choices: torch.Tensor
    text: float
    answers: list[str]
    accuracy: float
    exact_match: float
    word_perplexity: float


@pytest.fixture(scope="module", autouse=True)
def no_network() -> Iterator[None]:
    """Everything that is evaluated lies on this machine."""
    asked: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        asked.append(address)
        raise OSError(f"a local task must not connect, got {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        yield
    assert asked == []


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_smollm2(torch.device("cpu"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tasks")
    needles = [_needle(seed) for seed in range(len(COLOURS))]
    text = {"text": draw_excerpt(load_text("code"), characters=1200, seed=0)}
    documents = ((CHOICE, needles), (ANSWER, needles), (LIKELIHOOD, [text]))
    return [_local(folder, config, lines) for config, lines in documents]


@pytest.fixture(scope="module")
def dense(smollm2: LoadedModel, tasks: list[dict[str, Any]]) -> Scores:
    return evaluate(smollm2, tasks)


def _needle(seed: int) -> dict[str, str]:
    """A colour amid prose, asked for at its end; lengths differ, so that batches are padded."""
    lines = draw_excerpt(load_text("prose"), characters=1200 + 100 * seed, seed=seed).splitlines()
    lines.insert(len(lines) // 2, f"The colour of the hidden door is {COLOURS[seed]}.")
    return {
        "question": "\n".join([*lines, "The colour of the hidden door is"]),
        "colour": COLOURS[seed],
    }


def _local(folder: Path, config: dict[str, Any], documents: list[dict[str, str]]) -> dict[str, Any]:
    """The task over a file of JSON lines."""
    path = folder / f"{config['task']}.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    files = {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")}
    return {**config, "dataset_path": "json", "dataset_kwargs": files}


def evaluate(loaded: LoadedModel, tasks: list[dict[str, Any]]) -> Scores:
    harness = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=2)
    found = simple_evaluate(model=harness, tasks=tasks, bootstrap_iters=0)
    responses = {
        task: [sample["filtered_resps"] for sample in samples]
        for task, samples in found["samples"].items()
    }
    results = found["results"]
    return Scores(
        choices=torch.tensor([[value for value, _ in row] for row in responses["choice"]]),
        text=responses["likelihood"][0][0],
        answers=[row[0] for row in responses["answer"]],
        accuracy=results["choice"]["acc,none"],
        exact_match=results["answer"]["exact_match,strip"],
        word_perplexity=results["likelihood"]["word_perplexity,none"],
    )


def test_an_untouched_model_finds_every_needle(dense: Scores) -> None:
    assert (dense.accuracy, dense.exact_match) == (1.0, 1.0)
    assert dense.answers == COLOURS


def test_with_every_block_kept_the_harness_finds_the_dense_scores(
    smollm2: LoadedModel, tasks: list[dict[str, Any]], dense: Scores
) -> None:
    optimize(smollm2.model, UniSparse(block_size=BLOCK, top_p=1.0), min_length=0)
    with record_attention(smollm2.model) as calls:
        found = evaluate(smollm2, tasks)
    assert {call.density for call in calls if call.decision == "sparse"} == {1.0}
    torch.testing.assert_close(found.choices, dense.choices, rtol=ROUNDING, atol=ROUNDING)
    assert found.text == pytest.approx(dense.text, rel=ROUNDING)
    assert found.answers == dense.answers
    assert (found.accuracy, found.exact_match) == (dense.accuracy, dense.exact_match)


def test_the_harness_scores_what_runs_sparse(
    smollm2: LoadedModel, tasks: list[dict[str, Any]], dense: Scores
) -> None:
    optimize(smollm2.model, UniSparse(block_size=BLOCK, top_p=0.9), min_length=0)
    with record_attention(smollm2.model) as calls:
        found = evaluate(smollm2, tasks)
    prefills = [call for call in calls if call.q_len > BLOCK]
    assert any(call.masked for call in prefills)  # a batch of questions that differ in length
    assert {call.decision for call in prefills} == {"sparse"}
    assert all(0 < (call.density or 0) < 1 for call in prefills)
    left = {call.reason for call in calls if call.decision == "dense"}
    assert left == {DenseReason.FEW_QUERIES}  # decoding
    assert found.text < dense.text - 1.0
    assert (found.choices - dense.choices).abs().max() > 1e-2
    assert found.word_perplexity > dense.word_perplexity
    assert found.accuracy == dense.accuracy


def test_a_restored_model_is_scored_as_one_never_touched(
    smollm2: LoadedModel, tasks: list[dict[str, Any]], dense: Scores
) -> None:
    optimize(smollm2.model, UniSparse(block_size=BLOCK, top_p=0.5), min_length=0)
    restore(smollm2.model)
    assert not is_optimized(smollm2.model)
    found = evaluate(smollm2, tasks)
    assert torch.equal(found.choices, dense.choices)
    assert found[1:] == dense[1:]
