"""What a model's weights are is nothing to the plug-in: adapters and ranks answer as ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unisparse_flex.integrations.vllm import read_counts

from .engine import ALL_BLOCKS, ask, differ_by, prompt_of, save_llama, serving

RANK = 4


def save_adapter(folder: Path, hidden: int, widths: dict[str, int]) -> Path:
    """Writes a LoRA adapter of two layers whose update is as large as the weights."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(2):
        for name, width in widths.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator)
            tensors[f"{place}.lora_B.weight"] = torch.randn(width, RANK, generator=generator) / 8
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(widths)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_adapters_answer_as_with_the_parent(llama: Path, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest("a", 1, str(save_adapter(tmp_path, 128, {"q_proj": 128, "v_proj": 64})))
    options: dict[str, Any] = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
    prompts = [prompt_of(length, length) for length in (1000, 300, 50)]
    with serving(llama, None, **options) as engine:
        plain = ask(engine, prompts)
        expected = ask(engine, prompts, adapter=adapter)
    assert differ_by(plain, expected) > 0.1
    with serving(llama, ALL_BLOCKS, **options, max_num_batched_tokens=640) as engine:
        found = ask(engine, prompts, adapter=adapter)
    assert differ_by(found, expected) < 1e-4
    assert read_counts().sparse_rows > 2


def save_in_8_bits(folder: Path) -> Path:
    """A Llama whose linear layers hold integers of 8 bits, a scale for each row."""
    from safetensors.torch import load_file, save_file

    save_llama(folder)
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        tensors[name] = weight
        if name.endswith("proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    integers = {"num_bits": 8, "type": "int", "symmetric": True}
    layers = {
        "targets": ["Linear"],
        "weights": {**integers, "strategy": "channel", "dynamic": False},
        "input_activations": {**integers, "strategy": "token", "dynamic": True},
    }
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"all": layers},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(
    torch.cpu._is_amx_tile_supported(),
    reason="vLLM's 8-bit product takes no float32 on a CPU with AMX, and its bfloat16 is refused",
)
def test_quantised_weights_answer_as_with_the_parent(tmp_path: Path) -> None:
    model = save_in_8_bits(tmp_path)
    prompts = [prompt_of(length, length) for length in (1000, 300, 50)]
    with serving(model, None) as engine:
        expected = ask(engine, prompts)
    with serving(model, ALL_BLOCKS, max_num_batched_tokens=640) as engine:
        found = ask(engine, prompts)
    assert differ_by(found, expected) < 1e-4
    assert read_counts().sparse_rows > 2


@pytest.mark.slow
def test_tensor_parallel_ranks_answer_as_one(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A fork would share the threads of earlier engines, and two cores have none to bind apart.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # Each head has a number of its own: a rank that took another's would answer otherwise.
    numbers = "UniSparse(head_thresholds=(0.0, 0.05, 0.2, 0.4), c_h=1)"
    settings = {"selector": numbers, "min_length": 0}
    prompts = [prompt_of(length, length) for length in (1000, 300, 50)]
    with serving(llama, settings, max_num_batched_tokens=640) as engine:
        expected = ask(engine, prompts)
    assert 0 < read_counts().density < 0.95
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with serving(llama, settings, max_num_batched_tokens=640, **ranks) as engine:
        found = ask(engine, prompts)
    assert differ_by(found, expected) < 1e-4
