from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch

from unisparse_flex.evaluation.ruler import TASK_NAMES, TaskSample, build_task, score

NIAH = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery")
NEEDLE = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.")
SLACK = {"vt": 6, "cwe": 10, "fwe": 24}  # tokens that one more word or sentence may take


def build(name: Any, tokenizer: Any, tokens: int = 1500, seed: int = 0, **more: Any) -> TaskSample:
    return build_task(name, tokenizer, tokens=tokens, seed=seed, **more)


def text_of(sample: TaskSample, tokenizer: Any) -> str:
    text = tokenizer.decode(sample.input_ids[0].tolist())
    assert isinstance(text, str)
    return text


def entries_of(text: str) -> Counter[str]:
    """The numbered words of cwe's last list."""
    return Counter(re.findall(r"\d+\. ([a-z]+)", text.rsplit("Below is", 1)[1]))


@pytest.mark.parametrize("name", TASK_NAMES)
@pytest.mark.parametrize("tokens", [1000, 1024, 4095, 4096])
def test_a_prompt_fills_its_tokens_and_no_more(name, tokens, tokenizer):
    for seed in range(2):
        sample = build(name, tokenizer, tokens, seed)
        assert sample.name == name
        assert sample.input_ids.dtype == torch.int64
        assert sample.input_ids.shape[0] == 1
        assert tokens - SLACK.get(name, 8) < sample.input_ids.shape[1] <= tokens


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_sample_depends_on_its_seed_alone(name, tokenizer):
    first, again, other = (build(name, tokenizer, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.answers == again.answers
    assert not torch.equal(first.input_ids, other.input_ids)
    assert first.answers != other.answers


@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_answers_are_in_the_prompt_and_distinct(name, tokenizer):
    sample = build(name, tokenizer)
    counts = {"niah_single": 1, "niah_multikey": 1, "vt": 5, "cwe": 10, "fwe": 3}
    assert len(set(sample.answers)) == len(sample.answers) == counts.get(name, 4)
    assert score(sample, text_of(sample, tokenizer)) == 1.0


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_prompt_stops_where_the_answer_starts(name, tokenizer):
    text = text_of(build(name, tokenizer), tokenizer)
    assert text.endswith((" is", " are", " are:"))
    assert score(build(name, tokenizer), text.rsplit("\n", 1)[1]) == 0.0


@pytest.mark.parametrize("name", NIAH)
@pytest.mark.parametrize("seed", range(3))
def test_only_the_needles_of_the_key_asked_for_are_answers(name, seed, tokenizer):
    sample = build(name, tokenizer, seed=seed)
    text = text_of(sample, tokenizer)
    needles = NEEDLE.findall(text)
    assert len(needles) == (1 if name == "niah_single" else 4)
    match = re.search(r"numbers? for (.+) mentioned in the provided text\?", text)
    assert match is not None
    queries = match[1].replace("and ", "").split(", ")
    assert len(queries) == (4 if name == "niah_multiquery" else 1)
    asked = {value for key, value in needles if key in queries}
    assert asked == set(sample.answers)
    several = ("niah_multikey", "niah_multiquery")
    assert len({key for key, _ in needles}) == (4 if name in several else 1)
    others = " ".join(value for key, value in needles if key not in queries)
    assert score(sample, others) == 0.0


@pytest.mark.parametrize("name", ["niah_single", "niah_multikey"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_needle_asked_for_lies_at_its_depth(name, depth, tokenizer):
    sample = build(name, tokenizer, 4000, depth=depth)
    haystack = text_of(sample, tokenizer).split("\n")[1]
    needle = next(m for m in NEEDLE.finditer(haystack) if m[2] == sample.answers[0])
    before, after = haystack[: needle.start()].rstrip(), haystack[needle.end() :]
    assert not before or not after or before.endswith((".", "?", "!"))
    share = len(before) / (len(before) + len(after))
    assert abs(share - depth) < 0.05


@pytest.mark.parametrize("text", ["code", "topics"])
def test_needles_lie_in_any_text(text, tokenizer):
    sample = build("niah_single", tokenizer, 4000, text=text)
    assert 3980 < sample.input_ids.shape[1] <= 4000


def test_a_haystack_of_one_s_own_is_read_from_its_beginning_and_repeated(tokenizer):
    own = "Alpha beta gamma. Delta epsilon zeta."
    sample = build("niah_single", tokenizer, 800, haystack=own)
    text = text_of(sample, tokenizer)
    haystack = NEEDLE.sub("", text.split("\n")[1]).split()
    assert haystack == (own.split() * len(haystack))[: len(haystack)]
    assert len(haystack) > 50
    with pytest.raises(ValueError, match="haystack must hold at least one word, got none"):
        build("niah_single", tokenizer, haystack=" \n")


def test_a_chain_of_four_hops_leads_to_the_value(tokenizer):
    sample = build("vt", tokenizer)
    example, task = text_of(sample, tokenizer).split("Memorize and track")[1:]
    match = re.search(r"assigned the value (\d{5}) in the text above", task)
    assert match is not None
    chain = [f"VAR {sample.answers[0]} = {match[1]}"]
    chain += [
        f"VAR {b} = VAR {a}" for a, b in zip(sample.answers, sample.answers[1:], strict=False)
    ]
    assert [line for line in task.splitlines() if line.startswith("VAR")] == chain
    assert score(sample, example) == 0.0


def test_a_worked_example_answers_its_own_question(tokenizer):
    example = text_of(build("vt", tokenizer), tokenizer).split("Memorize and track")[1]
    names = re.findall(r"VAR ([A-Z]{3}) =", example)
    assert example.rstrip().endswith("they are: " + " ".join(names))


@pytest.mark.parametrize(("tokens", "often", "seldom"), [(1500, 6, 1), (4096, 30, 3)])
def test_common_words_come_more_often_than_all_others(tokens, often, seldom, tokenizer):
    sample = build("cwe", tokenizer, tokens)
    text = text_of(sample, tokenizer)
    counts = entries_of(text)
    assert {counts.pop(answer) for answer in sample.answers} == {often}
    assert max(counts.values()) == seldom
    assert score(sample, " ".join(counts)) == 0.0
    assert score(sample, text.rsplit("Below is", 1)[0]) == 0.0  # the worked example


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tokens", [400, 1500, 8192])
def test_frequent_words_lead_by_one_at_least(tokens, seed, tokenizer):
    sample = build("fwe", tokenizer, tokens, seed)
    context = text_of(sample, tokenizer).split("coded words. ", 1)[1].split("\n")[0]
    counts = Counter(context.split())
    (dots, _), *words = counts.most_common()
    assert dots == "..."
    assert tuple(word for word, _ in words[:3]) == sample.answers
    assert words[2][1] > words[3][1]
    assert score(sample, " ".join(word for word, _ in words[3:])) == 0.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("abc and DEF.", 1.0),
        ("DEF", 0.5),
        ("xabcx", 0.5),
        ("ABC abc", 0.5),
        ("", 0.0),
        ("ab c", 0.0),
    ],
)
def test_the_score_is_the_share_of_answers_contained(answer, expected):
    sample = TaskSample(
        name="vt", input_ids=torch.zeros(1, 1), answers=("ABC", "def"), max_new_tokens=1
    )
    assert score(sample, answer) == expected


def test_an_unknown_task_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=r"name must be one of niah_single, .*, got 'qa'"):
        build("qa", tokenizer)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_too_few_tokens_are_an_error_that_says_how_many_do(name, tokenizer):
    with pytest.raises(ValueError, match=r"tokens must be at least \d+ for task .*, got 50") as e:
        build(name, tokenizer, 50)
    match = re.search(r"at least (\d+)", str(e.value))
    assert match is not None
    assert build(name, tokenizer, int(match[1])).input_ids.shape[1] <= int(match[1])
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        build(name, tokenizer, 0)


def test_too_many_tokens_are_an_error():
    class Letters:
        """A tokenizer that needs a token for every three letters."""

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [0] * (len(text) // 3)

        def decode(self, token_ids: list[int]) -> str:
            raise NotImplementedError

    with pytest.raises(ValueError, match=r"tokens must be at most \d+ for task 'cwe', got 900000"):
        build("cwe", Letters(), 900_000)


@pytest.mark.parametrize("name", ["niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"])
def test_a_depth_is_for_one_needle(name, tokenizer):
    with pytest.raises(ValueError, match=rf"depth must be None for task '{name}', got 0.5"):
        build(name, tokenizer, depth=0.5)


@pytest.mark.parametrize("depth", [-0.1, 1.5])
def test_a_depth_outside_the_text_is_an_error(depth, tokenizer):
    with pytest.raises(ValueError, match=rf"depth must be in \[0, 1\], got {depth}"):
        build("niah_single", tokenizer, depth=depth)
