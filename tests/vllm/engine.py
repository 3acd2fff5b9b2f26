"""A tiny random Llama and the engines that serve it, in this process."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 512
MAX_LENGTH = 2048
# Every row of a block or more, and every block of it.
ALL_BLOCKS = {"selector": "UniSparse(top_p=1.0)", "min_length": 0}


@dataclass(frozen=True)
class Answer:
    """Tokens, and the log-probabilities of each and of its rivals."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


def save_llama(folder: Path, **changes: Any) -> Path:
    """Writes a Llama of two layers with random weights whose attention is peaked."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 128,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_LENGTH,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    config = LlamaConfig(**{**settings, **changes})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            # Logits of a few units: what a block is worth differs.
            layer.self_attn.q_proj.weight.mul_(12)
            layer.self_attn.k_proj.weight.mul_(12)
    model.save_pretrained(folder)
    return folder


@contextmanager
def serving(model: Path, settings: dict[str, Any] | None, **options: Any) -> Iterator[Any]:
    """An engine for ``model``; of the parent where ``settings`` is ``None``."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    given: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "enable_prefix_caching": False,
        "max_model_len": MAX_LENGTH,
        "max_num_batched_tokens": MAX_LENGTH,
        "max_num_seqs": 8,
        "seed": 0,
    }
    if settings is not None:
        given["additional_config"] = {"unisparse": settings}
        given["attention_config"] = {"backend": "CUSTOM"}
    engine = LLM(model=str(model), **{**given, **options})
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def prompt_of(length: int, seed: int) -> list[int]:
    """Random tokens."""
    generator = random.Random(seed)
    return [generator.randrange(3, VOCABULARY) for _ in range(length)]


def ask(
    engine: Any, prompts: Sequence[Sequence[int]], tokens: int = 4, adapter: Any = None
) -> list[Answer]:
    """What the engine continues prompts with, greedily."""
    from vllm import SamplingParams

    wanted = SamplingParams(
        max_tokens=tokens, temperature=0, detokenize=False, logprobs=4, ignore_eos=True
    )
    given: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    answers = []
    for output in engine.generate(given, wanted, use_tqdm=False, lora_request=adapter):
        [best] = output.outputs
        logprobs = [{t: p.logprob for t, p in step.items()} for step in best.logprobs or []]
        answers.append(Answer(tokens=list(best.token_ids), logprobs=logprobs))
    return answers


def differ_by(found: Sequence[Answer], expected: Sequence[Answer]) -> float:
    """The greatest difference of a log-probability; infinite where tokens differ."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if one.tokens != other.tokens:
            return float("inf")
        for step, reference in zip(one.logprobs, other.logprobs, strict=True):
            shared = step.keys() & reference.keys()
            worst = max(worst, *(abs(step[token] - reference[token]) for token in shared))
    return worst
