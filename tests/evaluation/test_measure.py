import math

import pytest
import torch

from unisparse_flex.evaluation.measure import (
    compute_kl,
    compute_log_probs,
    compute_perplexity,
    generate_greedily,
    prefill,
)


def test_kl_of_equal_distributions_is_zero():
    log_probs = compute_log_probs(torch.randn(300, 50))
    assert compute_kl(log_probs, log_probs) == 0.0


def test_kl_equals_torch_and_is_not_symmetric():
    torch.manual_seed(0)
    p, q = (compute_log_probs(torch.randn(300, 50)) for _ in range(2))
    expected = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    assert compute_kl(p, q) == pytest.approx(float(expected), rel=1e-5)
    assert compute_kl(p, q) != pytest.approx(compute_kl(q, p), rel=1e-5)


def test_perplexity_of_a_uniform_guess_is_the_vocabulary():
    log_probs = compute_log_probs(torch.zeros(7, 50))
    assert compute_perplexity(log_probs, torch.arange(7)) == pytest.approx(50.0)


def test_perplexity_is_the_exponential_of_cross_entropy():
    torch.manual_seed(0)
    logits, targets = torch.randn(9, 50), torch.randint(50, (9,))
    expected = math.exp(torch.nn.functional.cross_entropy(logits, targets))
    assert compute_perplexity(compute_log_probs(logits), targets) == pytest.approx(expected)


def test_greedy_answer_equals_rereading_the_whole_text(tiny_model):
    ids = torch.arange(40)[None]
    start = prefill(tiny_model.model, ids, logits_to_keep=3)
    assert start.logits.shape[1] == 3
    assert start.seconds > 0
    answer = generate_greedily(tiny_model.model, start, max_tokens=5, stop_ids=set())
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, tiny_model.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert answer == ids[0, 40:].tolist()


def test_answer_ends_before_a_stop_token(tiny_model):
    def answer(stop_ids):
        start = prefill(tiny_model.model, torch.arange(40)[None], logits_to_keep=1)
        return generate_greedily(tiny_model.model, start, max_tokens=5, stop_ids=stop_ids)

    whole = answer(set())
    assert answer({whole[2]}) == whole[: whole.index(whole[2])]
