"""Rows, summaries and answers of `bench.decode`."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from statistics import mean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.decode import describe, describe_together
from bench.decode.answers import Exam, Solved, shortest_solution, stop_ids
from bench.decode.attention import Decoder, Setting, decoding
from bench.decode.continuation import Continuation, decode, read_prompt
from bench.decode.measure import list_settings
from bench.decode.rows import Rows
from bench.decode.summaries import SUMMARIES
from bench.figures.decoding import points_of
from bench.quality import Subject
from unisparse_flex.block_masks.pages import DecodeSelector, UnitSummaries, keep_units
from unisparse_flex.evaluation import (
    LoadedModel,
    TaskSample,
    compute_log_probs,
    generate_greedily,
    score,
)

HEADS, KV_HEADS, WIDTH, SCALE = 4, 2, 16, 0.25


def draw(length: int, rows: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(batch, HEADS, rows, WIDTH, generator=generator) * 2
    key, value = torch.randn(2, batch, KV_HEADS, length, WIDTH, generator=generator)
    return query, key, value


def one_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The call that decoding of this row makes by itself."""
    last = key.shape[2] - query.shape[2] + row + 1
    return query[:, :, row : row + 1], key[:, :, :last], value[:, :, :last]


@pytest.mark.parametrize("name", SUMMARIES)
@settings(max_examples=12)
@given(
    unit=st.sampled_from([16, 64]), length=st.integers(150, 260), rows=st.sampled_from([1, 17, 140])
)
def test_rows_of_a_sequence_are_what_decoding_one_by_one_computes(
    name: str, unit: int, length: int, rows: int
) -> None:
    tensors = draw(length, rows)
    selector = DecodeSelector(share=0.3, unit=unit, min_keys=0)
    setting = Setting(summary=name, selector=selector)
    together = Decoder(setting=setting).attend(*tensors, None, SCALE)
    for row in {0, rows // 2, rows - 1}:
        alone = Decoder(setting=setting).attend(*one_row(*tensors, row), None, SCALE)
        torch.testing.assert_close(together[:, row], alone[:, 0])


@pytest.mark.parametrize("name", SUMMARIES)
def test_sequences_of_a_batch_are_what_each_computes_by_itself(name: str) -> None:
    query, key, value = draw(333, 1, batch=3)
    starts = torch.tensor([0, 70, 201])
    setting = Setting(summary=name, selector=DecodeSelector(share=0.3, unit=32, min_keys=0))
    together = Decoder(setting=setting).attend(query, key, value, starts, SCALE)
    for place, start in enumerate(starts.tolist()):
        own = (query[place, None], key[place, None, :, start:], value[place, None, :, start:])
        alone = Decoder(setting=setting).attend(*own, None, SCALE)
        torch.testing.assert_close(together[place], alone[0])


def test_all_units_give_dense_attention() -> None:
    query, key, value = draw(300, 90)
    rows = Rows.of_sequence(query, key, value, page=64, scale=SCALE)
    kept = torch.ones(90, KV_HEADS, 5, dtype=torch.bool)
    mask = torch.ones(90, 300, dtype=torch.bool).tril(210)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=SCALE, enable_gqa=True
    )
    torch.testing.assert_close(rows.attend(kept), dense[0].transpose(0, 1))
    assert float(rows.recall(kept)) == pytest.approx(1)
    assert float(rows.share(kept)) == 1


def test_share_and_recall_count_the_keys_that_a_row_sees() -> None:
    query, key, value = draw(100, 3)
    rows = Rows.of_sequence(query, torch.zeros_like(key), value, page=32, scale=SCALE)
    kept = torch.zeros(3, KV_HEADS, 4, dtype=torch.bool)
    kept[:, :, [0, 3]] = True
    expected = sum((32 + seen - 96) / seen for seen in (98, 99, 100)) / 3
    assert float(rows.share(kept)) == pytest.approx(expected)
    assert float(rows.recall(kept)) == pytest.approx(expected)


def test_quest_bounds_every_logit_of_a_unit() -> None:
    rows = Rows.of_sequence(*draw(250, 40), page=32, scale=SCALE)
    highest = rows.logits.unflatten(-1, (-1, 32)).amax(-1)
    bounds = SUMMARIES["quest"].estimate(rows)
    assert bool((bounds >= highest - 1e-5).all())
    assert torch.equal(bounds.isinf(), highest.isinf())


@pytest.mark.parametrize(("name", "error"), [("mean", 1e-5), ("unisparse", 0.05)])
def test_units_of_equal_keys_are_estimated_exactly_but_for_8_bits(name: str, error: float) -> None:
    query, key, value = draw(256, 1)
    same = key.unflatten(2, (-1, 32))[:, :, :, :1].expand(-1, -1, -1, 32, -1).flatten(2, 3)
    rows = Rows.of_sequence(query, same, value, page=32, scale=SCALE)
    found = SUMMARIES[name].estimate(rows)
    torch.testing.assert_close(found, rows.masses(), rtol=0, atol=error)


def test_oracle_keeps_the_most_attention_of_all_summaries() -> None:
    tensors = draw(1000, 60)
    recalls = {}
    for name in SUMMARIES:
        setting = Setting(summary=name, selector=DecodeSelector(share=0.2, unit=16, min_keys=0))
        decoder = Decoder(setting=setting)
        decoder.attend(*tensors, None, SCALE)
        recalls[name] = decoder.row()["recall"]
    assert max(recalls, key=lambda name: recalls[name]) == "oracle"
    assert recalls["oracle"] > recalls["quest"]


def test_memory_counts_keys_and_values() -> None:
    assert SUMMARIES["quest"].memory(32, 64) == 2 / 64
    assert SUMMARIES["mean"].memory(32, 64) == 1 / 64
    assert SUMMARIES["oracle"].memory(32, 64) == 0
    keys = torch.zeros(10, KV_HEADS, 32, WIDTH, dtype=torch.bfloat16)
    units = UnitSummaries.create(keys, 32)
    assert SUMMARIES["pinned"].memory(32, WIDTH) == units.nbytes / (2 * keys.nbytes)


def test_settings_are_dense_decoding_and_every_summary_at_the_same_points() -> None:
    found = list_settings(["quest", "oracle"], (32, 128), (0.1, 0.2), (0.9,), (0.1,))
    assert [s.summary for s in found] == [None, *["quest"] * 4, *["oracle"] * 4]
    assert [s.selector for s in found[1:5]] == [s.selector for s in found[5:]]
    assert [s.selector.unit for s in found[1:5]] == [32, 32, 32, 128]
    assert [s.selector.share for s in found[1:5]] == [0.1, 0.2, None, 0.1]
    with pytest.raises(ValueError, match=r"summaries must be of .* got nothing"):
        list_settings(["nothing"], (32,), (0.1,), (), ())


def test_shares_are_of_all_units_rounded_up() -> None:
    rows = Rows.of_sequence(*draw(1000, 1), page=32, scale=SCALE)
    selector = DecodeSelector(share=0.1, unit=32, min_keys=0)
    kept = keep_units(rows.masses(), rows.lengths, selector)
    assert kept.sum(-1).unique().tolist() == [math.ceil(0.1 * 32)]


def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        initializer_range=0.3,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


class Letters:
    """A tokenizer whose tokens are letters, digits and two more signs."""

    eos_token_id = bos_token_id = 64  # none of the vocabulary

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(48 + number) for number in ids)


def make_subject() -> Subject:
    loaded = LoadedModel(
        model=tiny_model(),
        tokenizer=Letters(),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    return Subject(name="tiny", loaded=loaded)


def make_exam(subject: Subject, kind: str, lengths: list[int]) -> Exam:
    """What the model says after random prompts, and the third and fourth letter as its answer."""
    solved = []
    for length in lengths:
        ids = torch.randint(63, (1, length), generator=torch.Generator().manual_seed(length))
        start = read_prompt(subject, ids, kind)
        again = replace(start, cache=copy.deepcopy(start.cache))
        answer = generate_greedily(
            subject.loaded.model, again, max_tokens=10, stop_ids=stop_ids(subject)
        )
        sample = TaskSample(
            name="niah_single",
            input_ids=ids,
            answers=(Letters().decode(answer[2:4]),),
            max_new_tokens=10,
        )
        needed = shortest_solution(subject, sample, answer)
        assert needed is not None
        solved.append(Solved(sample=sample, start=start, answer=answer[:needed]))
    return Exam(subject=subject, name="niah_single", drawn=len(lengths), solved=solved)


@pytest.mark.parametrize("summary", ["mean", "pinned"])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_answers_are_those_of_decoding_token_by_token(share: float, summary: str) -> None:
    subject = make_subject()
    exam = make_exam(subject, "dense", [170, 203, 210])
    setting = Setting(
        summary=summary,
        selector=DecodeSelector(
            share=share, unit=16, min_keys=0, sink_keys=16, last_keys=16, prompt_share=0.5
        ),
    )
    found = exam.judge(setting)
    scores, same = [], []
    for one in exam.solved:
        start = replace(one.start, cache=copy.deepcopy(one.start.cache))
        with decoding(subject.loaded.model, setting, [one.start.observed]):
            answer = generate_greedily(
                subject.loaded.model, start, max_tokens=10, stop_ids=stop_ids(subject)
            )
        scores.append(score(one.sample, Letters().decode(answer)))
        same.append(answer[: len(one.answer)] == one.answer)
    assert found["answers_kept"] == mean(scores)
    assert found["same_answers"] == mean(same)
    assert not all(same)


def test_dense_decoding_and_all_keys_keep_every_answer() -> None:
    exam = make_exam(make_subject(), "dense", [120, 150])
    for setting in (
        Setting(summary=None, selector=DecodeSelector()),
        Setting(summary="quest", selector=DecodeSelector(unit=16)),
    ):
        found = exam.judge(setting)
        assert found["answers_kept"] == found["same_answers"] == found["kept"] == 1


def test_decoding_of_all_keys_is_dense_and_of_few_is_not() -> None:
    subject = make_subject()
    ids = torch.randint(63, (1, 250), generator=torch.Generator().manual_seed(0))
    start = read_prompt(subject, ids[:, :230], "dense")
    cache = start.cache
    dense = compute_log_probs(decode(subject, ids[:, 230:], cache)[0])
    one = Continuation(
        subject=subject,
        input_ids=ids[:, 230:],
        cache=cache,
        observed=start.observed,
        dense=dense,
    )
    everything = one.judge(Setting(summary="unisparse", selector=DecodeSelector(unit=16)))
    few = DecodeSelector(share=0.05, unit=16, min_keys=0)
    some = one.judge(Setting(summary="unisparse", selector=few))
    assert everything["kl"] < 1e-6 < some["kl"]
    assert everything["kept"] == 1 > some["kept"] > 0.05
    assert cache.get_seq_length() == 230


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_what_the_last_rows_look_at_is_their_attention(kind: str) -> None:
    subject = make_subject()
    ids = torch.randint(63, (1, 250), generator=torch.Generator().manual_seed(0))
    start = read_prompt(subject, ids, kind)
    assert start.cache.get_seq_length() == 250
    shares = start.observed.shares[0]
    assert shares.shape == (16, KV_HEADS, HEADS // KV_HEADS, 32)
    torch.testing.assert_close(shares.float().sum(-1), torch.ones(16, 2, 2), rtol=0, atol=0.01)
    seen = torch.arange(235, 251)[:, None] > torch.arange(32) * 8
    assert torch.equal((shares > 0).all(1).all(1), seen)
    if kind == "dense":
        whole = subject.loaded.model(ids).logits[:, -1:]
        torch.testing.assert_close(start.logits, whole, rtol=0, atol=1e-4)


def test_units_that_are_pinned_stay() -> None:
    subject = make_subject()
    ids = torch.randint(63, (1, 320), generator=torch.Generator().manual_seed(0))
    observed = read_prompt(subject, ids[:, :319], "dense").observed
    selector = DecodeSelector(share=0.1, unit=16, min_keys=0, prompt_share=1.0, last_keys=16)
    tensors = draw(320, 1)
    recalls = {}
    for name in ("pinned", "unisparse"):
        decoder = Decoder(setting=Setting(summary=name, selector=selector), observed=[observed])
        decoder.attend(*tensors, None, SCALE)
        recalls[name] = decoder.row()
    assert recalls["pinned"] != recalls["unisparse"]
    assert recalls["pinned"]["kept"] == pytest.approx(5 / 20)
    assert recalls["unisparse"]["kept"] == pytest.approx(3 / 20)
    assert observed.pinned(0, selector, 21).sum(-1).tolist() == [2, 2]


def make_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"summary": "dense", "text": "code", "prefill": "dense", "kl": 0.0, "same_token": 1.0}
    ]
    for name, kl in (("unisparse", 0.02), ("quest", 0.05)):
        about = {"summary": name, "unit": 32, "memory": 0.02, "prefill": "dense"}
        judged = {"same_token": 0.9, "kept": 0.1, "recall": 0.8}
        share, top_p = {"share": 0.1, "top_p": None}, {"share": None, "top_p": 0.9}
        rows.append(about | share | judged | {"text": "code", "kl": kl})
        rows.append(about | top_p | judged | {"text": "code", "kl": kl / 2})
        task = {"task": "vt", "answers_kept": 0.5, "kept": 0.1, "solved": 3, "drawn": 9}
        rows.append(about | share | task)
    return rows


def make_result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": "smollm2",
        "tokens": 8192,
        "decoded": 128,
        "group": 3,
        "dtype": "float32",
        "device": "CPU",
        "command": ["python"],
        "rows": rows,
    }


def test_tables_hold_ratios_to_quest_and_leave_rows_with_errors_out() -> None:
    failed = {"summary": "quest", "text": "prose", "errors": {"judge": "x"}}
    text = describe(make_result([*make_rows(), failed]), "decode-x.json")
    assert "8064 tokens and 128 decoded" in text
    assert "| unisparse | 32 | 2% | 0.0200 | 0.40 |" in text
    assert "| quest | 32 | 2% | 10.0%, KL 0.0250 |" in text
    assert "vt, dense prefill: 3 of 9 solved" in text


def test_tables_of_two_files_are_those_of_all_their_rows() -> None:
    texts, tasks = (
        [row for row in make_rows() if ("task" in row) == is_task] for is_task in (False, True)
    )
    together = describe_together([make_result(texts), make_result(tasks)], "x.json, y.json")
    assert "KL over Quest's" in together
    assert "Answers kept" in together
    assert together.count("`python`") == 2


def test_the_figure_has_the_shares_of_dense_prefills() -> None:
    rows = [*make_rows(), make_rows()[1] | {"prefill": "sparse", "kl": 9.0}]
    assert points_of(rows, "unisparse", 32) == [(0.1, 0.02)]
    assert points_of(rows, "unisparse", 64) == []
