from typing import Any

import pytest
import torch

from unisparse_flex.evaluation.model import LoadedModel, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tokenizer: Any) -> LoadedModel:
    """SmolLM2's tokenizer and architecture, with two small layers of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        attn_implementation="sdpa",
    )
    return LoadedModel(
        model=LlamaForCausalLM(config).eval(),
        tokenizer=tokenizer,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
