"""A small real model, texts, and what sparse attention changes in its answers, measured.

The benchmarks, the commands and the demo share it; it needs the extra ``unisparse-flex[demo]``.
"""

from .answers import generate_together, score_samples
from .longbench import LONGBENCH_NAMES, cut_prompts, read_longbench, score_answer
from .measure import (
    Prefill,
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
    load_gguf_tokenizer,
    load_smollm2,
    quiet_transformers,
    validate_gguf_tokenizer,
)
from .needle import Prompt, Tokenizer, build_prompt
from .quality import (
    QualityRow,
    Sparsity,
    TaskRow,
    TextPrompt,
    draw_samples,
    encode_start,
    judge_texts,
    mean_by_setting,
    score_tasks,
)
from .recall import (
    ROW_STRIDE,
    CaptureAttention,
    CapturedAttention,
    compute_recall,
    compute_recall_and_error,
)
from .rivals import RIVALS, LoadedRival, Rival, load_rival
from .ruler import TASK_NAMES, TaskName, TaskSample, build_task, score
from .speed import SpeedInterrupted, SpeedRow, measure_speed
from .texts import TEXT_NAMES, TEXT_SOURCES, TextName, draw_excerpt, load_text

__all__ = [
    "CONTEXT_LENGTH",
    "LONGBENCH_NAMES",
    "MODEL_NAME",
    "RIVALS",
    "ROW_STRIDE",
    "TASK_NAMES",
    "TEXT_NAMES",
    "TEXT_SOURCES",
    "CaptureAttention",
    "CapturedAttention",
    "LoadedModel",
    "LoadedRival",
    "Prefill",
    "Prompt",
    "QualityRow",
    "Rival",
    "Sparsity",
    "SpeedInterrupted",
    "SpeedRow",
    "TaskName",
    "TaskRow",
    "TaskSample",
    "TextName",
    "TextPrompt",
    "Tokenizer",
    "build_prompt",
    "build_task",
    "compute_kl",
    "compute_log_probs",
    "compute_perplexity",
    "compute_recall",
    "compute_recall_and_error",
    "cut_prompts",
    "describe_device",
    "draw_excerpt",
    "draw_samples",
    "encode_start",
    "generate_greedily",
    "generate_together",
    "judge_texts",
    "load_gguf_tokenizer",
    "load_rival",
    "load_smollm2",
    "load_text",
    "mean_by_setting",
    "measure_speed",
    "prefill",
    "quiet_transformers",
    "read_longbench",
    "score",
    "score_answer",
    "score_samples",
    "score_tasks",
    "validate_gguf_tokenizer",
]
