from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from unisparse_flex import Calibration, UniSparse
from unisparse_flex.cli import main

SELECTOR = "UniSparse(block_size=32, c_q=8, c_k=8, top_p=0.5)"
CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Standard error, its lines joined."""
        return " ".join(self.err.split())


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: two small layers of random weights, a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
        )
        LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs the command in this process."""

    def run(*arguments: Any) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def save_calibration(tmp_path: Path) -> Callable[[int, tuple[int, ...]], Path]:
    """Writes the file of a calibration: of so many layers, at these lengths."""

    def save(layers: int, lengths: tuple[int, ...]) -> Path:
        selector = UniSparse(block_size=32, c_q=8, c_k=8, top_p=0.3)
        path = tmp_path / "calibration.json"
        Calibration(
            layers={f"model.layers.{index}.self_attn": selector for index in range(layers)},
            quality="kl",
            target=0.01,
            reached=0.005,
            density=0.5,
            model="LlamaForCausalLM",
            unisparse_flex="0",
            torch="2",
            lengths=lengths,
        ).save(path)
        return path

    return save
