"""LongBench (arXiv 2308.14508) from its JSONL files: English questions with short answers.

Prompts, answer lengths and scores are those of LongBench. Its summaries, code, classes and Chinese
tasks are left out: they are scored by other packages (ROUGE, edit distance, word segmentation).
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .quality import begin_ids

_QA = (
    "Answer the question based on the given passages. Only give me the answer and do not output "
    "any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based "
    "on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
# As in LongBench, its slips of the keyboard too.
_TEMPLATES = {
    "narrativeqa": "You are given a story, which can be either a novel or a movie script, and a "
    "question. Answer the question asconcisely as you can, using a single phrase if possible. Do "
    "not provide any explanation.\n\nStory: {context}\n\nNow, answer the question based on the "
    "story asconcisely as you can, using a single phrase if possible. Do not provide any "
    "explanation.\n\nQuestion: {input}\n\nAnswer:",
    "qasper": "You are given a scientific article and a question. Answer the question as concisely "
    "as you can, using a single phrase or sentence if possible. If the question cannot be answered "
    'based on the information in the article, write "unanswerable". If the question is a yes/no '
    'question, answer "yes", "no", or "unanswerable". Do not provide any explanation.\n\n'
    "Article: {context}\n\n Answer the question based on the above article as concisely as you "
    "can, using a single phrase or sentence if possible. If the question cannot be answered based "
    'on the information in the article, write "unanswerable". If the question is a yes/no '
    'question, answer "yes", "no", or "unanswerable". Do not provide any explanation.\n\n'
    "Question: {input}\n\nAnswer:",
    "multifieldqa_en": "Read the following text and answer briefly.\n\n{context}\n\nNow, answer "
    "the following question based on the above text, only give me the answer and do not output any "
    "other words.\n\nQuestion: {input}\nAnswer:",
    "hotpotqa": _QA,
    "2wikimqa": _QA,
    "musique": _QA,
    "triviaqa": "Answer the question based on the given passage. Only give me the answer and do "
    "not output any other words. The following are some examples.\n\n{context}\n\n{input}",
    "passage_count": "There are some paragraphs below sourced from Wikipedia. Some of them may be "
    "duplicates. Please carefully read these paragraphs and determine how many unique paragraphs "
    "there are after removing duplicates. In other words, how many non-repeating paragraphs are "
    "there in total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after "
    "removing duplicates. The output format should only contain the number, such as 1, 2, 3, and "
    "so on.\n\nThe final answer is: ",
    "passage_retrieval_en": "Here are 30 paragraphs from Wikipedia, along with an abstract. Please "
    "determine which paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract."
    "\n\n{input}\n\nPlease enter the number of the paragraph that the abstract is from. The answer "
    'format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
}
LONGBENCH_NAMES = tuple(_TEMPLATES)
_ANSWER_TOKENS = {"narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64}
_OTHER_ANSWER_TOKENS = 32
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class LongBenchQuestion:
    """One line of a file.

    Attributes:
        name: The data set.
        prompt: What the model reads, before it is cut.
        answers: Any of them is right.
    """

    name: str
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LongBenchSample:
    """A prompt that fits, and what a right answer is like.

    Attributes:
        name: The data set.
        input_ids: ``[1, S]`` int64.
        answers: Any of them is right.
        max_new_tokens: How long the answer may be.
    """

    name: str
    input_ids: torch.Tensor
    answers: tuple[str, ...]
    max_new_tokens: int


def read_longbench(folder: Path, *, samples: int) -> dict[str, list[LongBenchQuestion]]:
    """Reads the first lines of every file ``<name>.jsonl`` whose data set is scored here.

    Args:
        folder: Of LongBench's files.
        samples: How many lines of each.

    Raises:
        ValueError: There is no such file, or a line is none of LongBench's.
        OSError: A file cannot be read.
    """
    found = {}
    for name in LONGBENCH_NAMES:
        path = folder / f"{name}.jsonl"
        if path.is_file():
            with path.open(encoding="utf-8") as lines:
                read = [
                    _question(name, line, f"{path.name}, line {number}")
                    for number, line in zip(range(1, samples + 1), lines, strict=False)
                ]
            if not read:
                raise ValueError(f"{path.name} must hold at least one line, got none")
            found[name] = read
    if not found:
        files = ", ".join(f"{name}.jsonl" for name in LONGBENCH_NAMES)
        raise ValueError(f"the folder must hold at least one of {files}, got none of them")
    return found


def _question(name: str, line: str, where: str) -> LongBenchQuestion:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    texts = [values.get(key) for key in ("input", "context")] if isinstance(values, dict) else []
    answers = values.get("answers") if isinstance(values, dict) else None
    if (
        len(texts) != 2
        or not all(isinstance(text, str) for text in texts)
        or not isinstance(answers, list)
        or not answers
    ):
        raise ValueError(
            f"{where} must be JSON with texts input and context and a list answers, got something "
            "else"
        )
    prompt = _TEMPLATES[name].format(input=texts[0], context=texts[1])
    return LongBenchQuestion(name=name, prompt=prompt, answers=tuple(map(str, answers)))


def cut_prompts(
    questions: Sequence[LongBenchQuestion], tokenizer: Any, *, tokens: int
) -> list[LongBenchSample]:
    """Prompts with room for their answers in ``tokens``; longer ones lose their middle.

    Args:
        questions: Of one data set.
        tokenizer: The model's own.
        tokens: Most tokens of a prompt and its answer.

    Raises:
        ValueError: ``tokens`` leave no room for a prompt.
    """
    begin, samples = begin_ids(tokenizer), []
    for question in questions:
        room = _ANSWER_TOKENS.get(question.name, _OTHER_ANSWER_TOKENS)
        length = tokens - room - len(begin)
        if length < 2:
            raise ValueError(f"tokens must be at least {room + len(begin) + 2}, got {tokens}")
        ids = tokenizer.encode(question.prompt, add_special_tokens=False, verbose=False)
        if len(ids) > length:
            half = length // 2
            ids = [*ids[:half], *ids[-half:]]
        samples.append(
            LongBenchSample(
                name=question.name,
                input_ids=torch.tensor([[*begin, *ids]]),
                answers=question.answers,
                max_new_tokens=room,
            )
        )
    return samples


def score_answer(sample: LongBenchSample, answer: str) -> float:
    """The best score of an answer by LongBench's rule for the data set, in [0, 1]."""
    if sample.name == "triviaqa":
        answer = answer.lstrip("\n").split("\n")[0]
    rule = _RULES.get(sample.name, compute_f1)
    return max(rule(answer, right) for right in sample.answers)


def compute_f1(answer: str, right: str) -> float:
    """F1 of the words, without case, punctuation and articles."""
    found, wanted = _words(answer), _words(right)
    same = sum((Counter(found) & Counter(wanted)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(found), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return _ARTICLES.sub(" ", plain).split()


def _share_of_numbers(answer: str, right: str) -> float:
    """The share of the numbers in the answer that are the right one."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def _share_of_paragraphs(answer: str, right: str) -> float:
    match = re.search(r"Paragraph (\d+)", right)
    return 0.0 if match is None else _share_of_numbers(answer, match[1])


_RULES: dict[str, Callable[[str, str], float]] = {
    "passage_count": _share_of_numbers,
    "passage_retrieval_en": _share_of_paragraphs,
}
