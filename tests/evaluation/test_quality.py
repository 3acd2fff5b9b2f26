"""Texts and tasks, dense and sparse: what is judged is what a whole forward pass predicts."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unisparse_flex import UniSparse, optimize, restore
from unisparse_flex.evaluation import answers, generate_together
from unisparse_flex.evaluation.quality import (
    QualityRow,
    Sparsity,
    TextPrompt,
    begin_ids,
    draw_samples,
    encode_start,
    judge_texts,
    mean_by_setting,
    score_tasks,
)
from unisparse_flex.optimization import is_optimized

ALL = UniSparse(block_size=32, c_q=8, c_k=8, top_p=1.0)
FEW = UniSparse(block_size=32, c_q=8, c_k=8, top_p=0.2)
JUDGED = 70


@pytest.fixture(scope="module")
def prompt(tiny_model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(tiny_model.tokenizer), (1, 300), generator=generator)
    return TextPrompt(text="random", input_ids=ids)


def test_nothing_changes_where_everything_is_kept(tiny_model, prompt):
    (row,) = judge_texts(tiny_model, [prompt], {"all": ALL}, judged=JUDGED)
    assert (row.density, row.sparse_calls, row.calls, row.judged) == (1.0, 2, 2, JUDGED)
    assert row.kl == pytest.approx(0.0, abs=1e-6)
    assert row.perplexity_ratio == pytest.approx(1.0, abs=1e-5)
    assert row.top1_agreement == 1.0
    assert not is_optimized(tiny_model.model)


def test_what_is_read_next_begins_with_the_name_of_the_setting(tiny_model, prompt):
    shown: list[str] = []
    settings = {"all": ALL, "few": FEW}
    list(judge_texts(tiny_model, [prompt], settings, judged=JUDGED, show=shown.append))
    assert shown == [f"{name}, 300 tokens of random" for name in ("dense", "all", "few")]


def test_the_last_tokens_are_judged_by_the_distributions_before_them(tiny_model, prompt):
    (row,) = judge_texts(tiny_model, [prompt], {"few": FEW}, judged=JUDGED)
    model, ids = tiny_model.model, prompt.input_ids

    @torch.no_grad()
    def read() -> torch.Tensor:
        return model(ids).logits[0].double().log_softmax(-1)[-JUDGED - 1 : -1]

    dense = read()
    sparse = read_with(model, read)
    targets = ids[0, -JUDGED:, None]
    kl = float((dense.exp() * (dense - sparse)).sum(-1).mean())
    assert row.kl == pytest.approx(kl, rel=1e-3)
    assert kl > 1e-5
    for found, log_probs in ((row.dense_perplexity, dense), (row.perplexity, sparse)):
        expected = math.exp(-float(log_probs.gather(-1, targets).mean()))
        assert found == pytest.approx(expected, rel=1e-5)
    assert row.top1_agreement == float((dense.argmax(-1) == sparse.argmax(-1)).double().mean())
    assert 0 < row.density < 1


def read_with(model: Any, read: Any) -> Any:
    optimize(model, FEW, min_length=0)
    try:
        return read()
    finally:
        restore(model)


def test_at_most_half_of_a_prompt_is_judged(tiny_model, prompt):
    short = TextPrompt(text="short", input_ids=prompt.input_ids[:, :101])
    (row,) = judge_texts(tiny_model, [short], {"all": ALL}, judged=JUDGED)
    assert (row.tokens, row.judged) == (101, 50)


def test_layers_can_stay_dense(tiny_model, prompt):
    sparsity = Sparsity(dense_layers=(0,))
    (row,) = judge_texts(tiny_model, [prompt], {"few": FEW}, judged=8, sparsity=sparsity)
    assert (row.sparse_calls, row.calls) == (1, 2)
    assert row.sparse_density < 1
    assert row.density == pytest.approx((1 + row.sparse_density) / 2)


def test_a_model_that_nothing_is_sparse_of_is_refused_and_left_plain(tiny_model, prompt):
    sparsity = Sparsity(min_length=4096)
    with pytest.raises(ValueError, match="no attention call ran sparse: "):
        list(judge_texts(tiny_model, [prompt], {"few": FEW}, judged=8, sparsity=sparsity))
    assert not is_optimized(tiny_model.model)


def test_a_model_that_predicts_no_numbers_is_refused(tiny_model, prompt):
    broken: Any = SimpleNamespace(
        model=lambda *_, **__: SimpleNamespace(logits=torch.full((1, 300, 9), torch.nan)),
        device=torch.device("cpu"),
    )
    broken.model.forward = broken.model
    with pytest.raises(ValueError, match="predict numbers, got NaN after 300 tokens of random"):
        list(judge_texts(broken, [prompt], {"few": FEW}, judged=8))


class _Begins:
    """A tokenizer of characters that puts 7 before a text."""

    bos_token_id = 7

    def encode(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> list[int]:
        return [7] * add_special_tokens + [ord(character) for character in text]


def test_a_prompt_begins_as_the_tokenizer_begins_a_text(tokenizer):
    assert begin_ids(tokenizer) == []
    assert begin_ids(_Begins()) == [7]
    assert encode_start(_Begins(), "abcdef", 3) == [7, ord("a"), ord("b")]
    text = "The quick brown fox. " * 50
    whole = tokenizer.encode(text, add_special_tokens=False)
    assert encode_start(tokenizer, text, 40) == whole[:40]
    assert encode_start(tokenizer, text, 10_000) == whole


def test_samples_leave_room_for_the_answer_and_take_haystacks_in_turn(tiny_model):
    haystacks = ["Alpha beta. Gamma delta.", "Epsilon zeta. Eta theta."]
    (drawn,) = draw_samples(
        tiny_model, ["niah_single"], tokens=600, samples=3, haystacks=haystacks
    ).values()
    assert all(s.input_ids.shape[1] + s.max_new_tokens <= 600 for s in drawn)
    texts = [tiny_model.tokenizer.decode(s.input_ids[0].tolist()) for s in drawn]
    assert ["Alpha" in text for text in texts] == [True, False, True]
    with pytest.raises(ValueError, match="tokens must be at least"):
        draw_samples(tiny_model, ["niah_single"], tokens=60, samples=1, haystacks=haystacks)


def test_tasks_are_scored_dense_first(tiny_model, monkeypatch):
    def short(*args, max_tokens, **options):
        return generate_together(*args, max_tokens=3, **options)

    monkeypatch.setattr(answers, "generate_together", short)
    samples = draw_samples(tiny_model, ["vt"], tokens=900, samples=2, haystacks=["Alpha beta."])
    rows = list(score_tasks(tiny_model, samples, {"all": ALL}, tokens=900))
    assert [(row.task, row.setting, row.samples) for row in rows] == [
        ("vt", None, 2),
        ("vt", "all", 2),
    ]
    assert rows[0].score == rows[1].score
    assert (rows[0].density, rows[1].density) == (None, 1.0)


def test_means_are_of_one_length_and_geometric_where_ratios():
    def row(tokens, setting, density, perplexity):
        return QualityRow(
            tokens=tokens,
            text="t",
            setting=setting,
            density=density,
            sparse_density=density,
            sparse_calls=1,
            calls=1,
            judged=1,
            kl=density,
            perplexity=perplexity,
            dense_perplexity=1.0,
            top1_agreement=density,
        )

    rows = [row(8, "a", 0.2, 2.0), row(8, "a", 0.4, 8.0), row(9, "a", 1.0, 1.0), row(8, "b", 1, 1)]
    means = mean_by_setting(rows, 8)
    assert list(means) == ["a", "b"]
    assert means["a"] == pytest.approx(
        {"density": 0.3, "kl": 0.3, "perplexity_ratio": 4.0, "top1_agreement": 0.3}
    )
