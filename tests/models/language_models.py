"""Decoder-only language models of transformers, from configurations only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch import nn

from .family import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, PADDING_TOKEN, VOCABULARY, Family, token_ids

WINDOW = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 512,
    "pad_token_id": PADDING_TOKEN,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
LAYER_TYPES = ["sliding_attention", "full_attention"]

MODES = (
    "forward",
    "forward, right padding",
    "forward, left padding",
    "compiled forward",
    "generate, DynamicCache",
    "generate, StaticCache",
    "generate, padded batch",
    "beam search",
    "chunked prefill",
    "export",
)


def _build(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        settings = getattr(transformers, config)(**{**SIZES, **options})
        implementation = options.get("attn_implementation", "sdpa")
        settings._attn_implementation = implementation
        return getattr(transformers, name)(settings)

    return build


def _family(
    name: str,
    model: str,
    config: str,
    *,
    modes: tuple[str, ...] = MODES,
    note: str = "",
    **options: Any,
) -> Family:
    return Family(
        name=name,
        build=_build(model, config, **options),
        inputs=lambda: {"input_ids": token_ids()},
        modes=modes,
        note=note,
    )


LANGUAGE_MODELS = (
    _family(
        "Llama",
        "LlamaForCausalLM",
        "LlamaConfig",
        modes=(
            *MODES,
            "compiled forward, right padding",
            "compiled forward, left padding",
            "compiled generate, DynamicCache",
            "compiled generate, StaticCache",
        ),
        **GROUPED,
    ),
    _family("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", **GROUPED),
    _family(
        "Mistral",
        "MistralForCausalLM",
        "MistralConfig",
        note=f"sliding window of {WINDOW} in every layer",
        sliding_window=WINDOW,
        **GROUPED,
    ),
    _family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        note=f"one layer with a sliding window of {WINDOW}, one without",
        modes=(*MODES, "compiled forward, right padding"),
        sliding_window=WINDOW,
        layer_types=LAYER_TYPES,
        query_pre_attn_scalar=HEAD_DIM,
        **GROUPED,
    ),
    _family(
        "Phi-3",
        "Phi3ForCausalLM",
        "Phi3Config",
        num_key_value_heads=KV_HEADS,
        original_max_position_embeddings=512,
    ),
    _family("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig"),
    _family(
        "gpt-oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        note="attention sinks: transformers offers no SDPA for it, its own eager attention runs",
        modes=("forward", "forward, left padding", "compiled forward", "generate, DynamicCache"),
        attn_implementation="eager",
        sliding_window=WINDOW,
        layer_types=LAYER_TYPES,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **GROUPED,
        **EXPERTS,
    ),
    _family("Mixtral", "MixtralForCausalLM", "MixtralConfig", **GROUPED, **EXPERTS),
    _family(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        note="multi-head latent attention: keys of 24, values of 16",
        num_key_value_heads=HEADS,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        num_mtp_layers=0,
    ),
)
