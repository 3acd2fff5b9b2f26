"""A small real model, texts, and what sparse attention changes in its answers, measured.

The benchmarks, the commands and the demo share it; it needs the extra ``unisparse-flex[demo]``.
"""

from .measure import (
    Prefill,
    cache_name,
    compute_kl,
    compute_log_probs,
    compute_perplexity,
    generate_greedily,
    prefill,
)
from .model import (
    CONTEXT_LENGTH,
    MODEL_NAME,
    LoadedModel,
    describe_device,
    load_smollm2,
    quiet_transformers,
)
from .needle import Prompt, Tokenizer, build_prompt
from .recall import (
    ROW_STRIDE,
    CaptureAttention,
    CapturedAttention,
    compute_recall,
    compute_recall_and_error,
)
from .texts import TEXT_NAMES, TEXT_SOURCES, TextName, draw_excerpt, load_text

__all__ = [
    "CONTEXT_LENGTH",
    "MODEL_NAME",
    "ROW_STRIDE",
    "TEXT_NAMES",
    "TEXT_SOURCES",
    "CaptureAttention",
    "CapturedAttention",
    "LoadedModel",
    "Prefill",
    "Prompt",
    "TextName",
    "Tokenizer",
    "build_prompt",
    "cache_name",
    "compute_kl",
    "compute_log_probs",
    "compute_perplexity",
    "compute_recall",
    "compute_recall_and_error",
    "describe_device",
    "draw_excerpt",
    "generate_greedily",
    "load_smollm2",
    "load_text",
    "prefill",
    "quiet_transformers",
]
