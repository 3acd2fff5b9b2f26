"""Answers generated in one batch are those of one prompt after the other."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unisparse_flex.evaluation.answers import generate_together
from unisparse_flex.evaluation.measure import Prefill, generate_greedily, prefill

LENGTHS = (9, 30, 17)


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def starts(model: LlamaForCausalLM) -> list[Prefill]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(61, (1, length), generator=generator) for length in LENGTHS]
    return [prefill(model, prompt, logits_to_keep=1) for prompt in ids]


def test_a_batch_answers_as_its_prompts_do_alone() -> None:
    model = small_model()
    alone = [
        generate_greedily(model, start, max_tokens=12, stop_ids=set()) for start in starts(model)
    ]
    assert generate_together(model, starts(model), max_tokens=12, stop_ids=set()) == alone
    assert len({tuple(answer) for answer in alone}) == len(LENGTHS)


def test_each_answer_ends_at_its_own_stop() -> None:
    model = small_model()
    whole = generate_together(model, starts(model), max_tokens=12, stop_ids=set())
    stop = {whole[0][3]}
    alone = [
        generate_greedily(model, start, max_tokens=12, stop_ids=stop) for start in starts(model)
    ]
    found = generate_together(model, starts(model), max_tokens=12, stop_ids=stop)
    assert found == alone
    assert len(found[0]) <= 3
