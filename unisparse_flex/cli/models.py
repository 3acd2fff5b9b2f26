"""MODEL on the command line: a folder, a GGUF file, ``smollm2`` or, where allowed, a hub name."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from ..doctor import default_device
from ..evaluation import (
    LoadedModel,
    load_gguf_tokenizer,
    load_smollm2,
    quiet_transformers,
)
from ..integrations.transformers_config import ATTRIBUTE
from ..passes.decision import device_obstacle
from .arguments import check_model
from .choices import BUNDLED, BUNDLED_CONTEXT, BUNDLED_LAYERS
from .failures import any_failure

# Lengths that a text model is made for, wherever its configuration says so.
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length")
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


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
    check_model(name, allow_download=allow_download)
    target = find_device(device)
    path = Path(name)
    if name == BUNDLED:
        with any_failure(f"load {name}"):
            return load_smollm2(target)
    if os.path.isdir(name):
        return _load(name, str(path), target, use_safetensors=True, local_files_only=True)
    if os.path.isfile(name):
        return _load(name, str(path.parent), target, gguf_file=path.name, local_files_only=True)
    return _load(name, name, target, use_safetensors=True)


def context_length(model: Any) -> int | None:
    """The most tokens that the model is made for; ``None`` where it does not say."""
    config = model.config
    for holder in (config, getattr(config, "text_config", None)):
        for key in LENGTH_KEYS:
            length = getattr(holder, key, None)
            if isinstance(length, int) and length > 0:
                return length
    return None


def stated_context(name: str) -> int | None:
    """What `context_length` will be, where MODEL says so without being loaded."""
    if name == BUNDLED:
        return BUNDLED_CONTEXT
    return _stated_number(_stated_config(name), LENGTH_KEYS)


def stated_settings(name: str) -> Any:
    """What is saved as settings in the folder MODEL; ``None`` where nothing is, or no folder."""
    config = {} if name == BUNDLED else _stated_config(name)
    of_text = config.get("text_config")
    return (of_text if isinstance(of_text, dict) else config).get(ATTRIBUTE)


def check_layers(name: str, layers: Sequence[int], *, of: str = "--dense-layers") -> None:
    """Raises where MODEL has no such layer, and says how many it has without being loaded.

    Args:
        name: MODEL.
        layers: Indices.
        of: What they were given by.

    Raises:
        click.UsageError: A layer is out of range.
    """
    count = BUNDLED_LAYERS
    if name != BUNDLED:
        config = _stated_config(name)
        # Of a model with towers the longest one counts, which is known once it is loaded.
        nested = any(isinstance(value, dict) and "model_type" in value for value in config.values())
        stated = None if nested else _stated_number(config, LAYER_KEYS)
        if stated is None:
            return
        count = stated
    for layer in layers:
        if not -count <= layer < count:
            raise click.UsageError(
                f"{of} must be of the model's layers, 0 to {count - 1} (or -{count} to -1, from "
                f"the end), got {layer}"
            )


def _stated_config(name: str) -> dict[str, Any]:
    """What the configuration in a folder says; nothing where there is none."""
    try:
        config = json.loads(Path(name, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _stated_number(config: dict[str, Any], keys: Sequence[str]) -> int | None:
    found = (config.get(key) for key in keys)
    return next((number for number in found if isinstance(number, int) and number > 0), None)


def _load(name: str, source: str, device: torch.device, **place: Any) -> LoadedModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with any_failure(f"load {name} as a causal language model"), quiet_transformers():
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=False,
            output_loading_info=True,
            **place,
        )
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"its files lack weights of {type(model).__name__}: {len(missing)}, such as "
                f"{missing[0]}; they would be random"
            )
    with any_failure(f"load the tokenizer of {name}"), quiet_transformers():
        if "gguf_file" in place:
            tokenizer = load_gguf_tokenizer(Path(source, place["gguf_file"]))
        else:
            place.pop("use_safetensors", None)
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **place)
    return LoadedModel(
        model=model.to(device, dtype).eval(), tokenizer=tokenizer, device=device, dtype=dtype
    )


def check_backend(backend: str, device: str | None) -> None:
    """Raises where a kernel is asked for that no call on the device can have.

    Args:
        backend: Of ``--backend``.
        device: Of ``--device``; the first GPU if there is one by default.

    Raises:
        click.UsageError: The device, or the package of the kernel, is not there.
    """
    if (obstacle := device_obstacle(backend, find_device(device))) is not None:
        raise click.UsageError(f"--backend {backend} cannot run here: {obstacle}; leave it out")


def find_device(text: str | None) -> torch.device:
    """The device of ``--device``; the first GPU if there is one by default.

    Raises:
        click.UsageError: It is not there.
    """
    if text is None:
        return default_device()
    device = torch.device(text)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = f"only {count} found here" if count else "not found here"
            raise click.UsageError(
                f"--device {text} needs a CUDA device, {found}; run: unisparse-flex doctor"
            )
    return device
