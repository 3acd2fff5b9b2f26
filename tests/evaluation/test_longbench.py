"""LongBench: prompts as others have them, cut in the middle, scored by its rules."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from unisparse_flex.evaluation.longbench import (
    _TEMPLATES,
    LONGBENCH_NAMES,
    LongBenchQuestion,
    LongBenchSample,
    compute_f1,
    cut_prompts,
    read_longbench,
    score_answer,
)


class _Loader(yaml.SafeLoader):
    """Reads what lm-evaluation-harness writes."""


_Loader.add_constructor("!function", lambda loader, node: node.value)


def lm_eval_task(name):
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "tasks" / "longbench" / f"{name}.yaml"
    return yaml.load(path.read_text(encoding="utf-8"), _Loader)


@pytest.mark.parametrize("name", LONGBENCH_NAMES)
def test_prompts_and_lengths_of_answers_are_those_of_lm_evaluation_harness(name, tokenizer):
    task = lm_eval_task(name)
    theirs = task["doc_to_text"].replace("{{context}}", "{context}")
    theirs = theirs.replace("{{question}}", "{input}")
    # It leaves out the last blank, and one of triviaqa's empty lines.
    ours = _TEMPLATES[name]
    assert ours.replace("\n\n", "\n").strip() == theirs.replace("\n\n", "\n").strip()
    question = LongBenchQuestion(name=name, prompt="Who?", answers=("x",))
    (sample,) = cut_prompts([question], tokenizer, tokens=500)
    assert sample.max_new_tokens == task["generation_kwargs"]["max_gen_toks"]


def write(folder: Path, name: str, *lines: Any) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def test_the_first_lines_of_the_files_that_are_scored_are_read(tmp_path):
    line = {"input": "Who {x}?", "context": "A {fox}.", "answers": ["a fox"], "length": 3}
    write(tmp_path, "musique", line, line, line)
    write(tmp_path, "gov_report", line)
    found = read_longbench(tmp_path, samples=2)
    assert list(found) == ["musique"]
    assert len(found["musique"]) == 2
    assert found["musique"][0].prompt.endswith("Question: Who {x}?\nAnswer:")
    assert "passages.\nA {fox}.\n" in found["musique"][0].prompt
    assert found["musique"][0].answers == ("a fox",)


@pytest.mark.parametrize(
    "line", [{"input": "Who?"}, [], {"input": 1, "context": "", "answers": [1]}]
)
def test_a_line_of_something_else_is_named(tmp_path, line):
    good = {"input": "Who?", "context": "A fox.", "answers": ["a fox"]}
    write(tmp_path, "qasper", good, line)
    with pytest.raises(ValueError, match=r"qasper.jsonl, line 2 must be JSON with texts input"):
        read_longbench(tmp_path, samples=5)


def test_a_folder_without_files_and_a_file_without_lines_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"at least one of narrativeqa.jsonl, .*, got none"):
        read_longbench(tmp_path, samples=1)
    write(tmp_path, "qasper")
    with pytest.raises(ValueError, match=r"qasper.jsonl must hold at least one line, got none"):
        read_longbench(tmp_path, samples=1)


def test_a_long_prompt_loses_its_middle(tokenizer):
    prompt = "".join(f"sentence {n}. " for n in range(400))
    question = LongBenchQuestion(name="musique", prompt=prompt, answers=("x",))
    (sample,) = cut_prompts([question], tokenizer, tokens=132)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert sample.input_ids[0].tolist() == [*ids[:50], *ids[-50:]]
    (whole,) = cut_prompts([question], tokenizer, tokens=len(ids) + 32)
    assert whole.input_ids[0].tolist() == ids
    with pytest.raises(ValueError, match="tokens must be at least 34, got 33"):
        cut_prompts([question], tokenizer, tokens=33)


def sample(name: str, *answers: str) -> LongBenchSample:
    return LongBenchSample(name=name, input_ids=None, answers=answers, max_new_tokens=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "answer", "answers", "expected"),
    [
        ("hotpotqa", "The Red fox!", ["a cat", "red fox"], 1.0),
        ("hotpotqa", "red dog", ["red fox"], 0.5),
        ("hotpotqa", "", ["red fox"], 0.0),
        ("triviaqa", "\nred fox\nPassage: and on", ["red fox"], 1.0),
        ("passage_count", "7, or 12", ["12"], 0.5),
        ("passage_count", "none", ["12"], 0.0),
        ("passage_retrieval_en", "Paragraph 12", ["Paragraph 12"], 1.0),
        ("passage_retrieval_en", "Paragraph 1", ["Paragraph 12"], 0.0),
    ],
)
def test_scores_are_the_best_over_the_answers(name, answer, answers, expected):
    assert score_answer(sample(name, *answers), answer) == pytest.approx(expected)


def test_f1_counts_each_word_as_often_as_both_have_it():
    assert compute_f1("fox fox dog", "fox cat") == pytest.approx(2 * (1 / 3) * (1 / 2) / (5 / 6))
