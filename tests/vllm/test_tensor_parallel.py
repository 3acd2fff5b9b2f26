"""Tensor parallel on two GPUs: with every block and every unit ranks answer as the parent's.

Engines are processes of their own, for one's memory is not another's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from .engine import ALL_BLOCKS, Answer, ask, differ_by, prompt_of, save_llama, serving

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

PROMPTS = [prompt_of(length, length) for length in (1900, 1000, 640, 50)]
# Log-probabilities of two orders of summation in bfloat16.
TOLERANCE = 0.06
SETTINGS: dict[str, dict[str, Any] | None] = {
    "parent": None,
    "prefill": {**ALL_BLOCKS, "parent": "FLASH_ATTN"},
    "decode": {**ALL_BLOCKS, "parent": "FLASH_ATTN", "decode": {"top_p": 1.0}},
}


def answer(folder: Path, name: str, output: Path) -> None:
    """Writes what an engine over two GPUs answers."""
    settings = SETTINGS[name]
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        "max_num_batched_tokens": 640,
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 2**30,
    }
    if settings is None:
        options["attention_config"] = {"backend": "FLASH_ATTN"}
    if name == "decode":
        options["enforce_eager"] = False
        options["compilation_config"] = {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8],
        }
    with serving(folder, settings, **options) as engine:
        found = ask(engine, PROMPTS, tokens=16)
    output.write_text(json.dumps([asdict(one) for one in found]))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Answer]]:
    """What all engines answer; they run side by side."""
    home = tmp_path_factory.mktemp("ranks")
    folder = save_llama(
        home / "llama",
        hidden_size=512,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        dtype="bfloat16",
    )
    outputs = {name: home / f"{name}.json" for name in SETTINGS}
    running = [
        subprocess.Popen([sys.executable, "-m", __name__, str(folder), name, str(output)])
        for name, output in outputs.items()
    ]
    assert [one.wait(300) for one in running] == [0] * len(running)
    return {name: read_answers(output) for name, output in outputs.items()}


def read_answers(file: Path) -> list[Answer]:
    """What `answer` wrote."""
    return [
        Answer(one["tokens"], [{int(t): p for t, p in step.items()} for step in one["logprobs"]])
        for one in json.loads(file.read_text())
    ]


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_ranks_answer_as_the_parents(name: str, answers: dict[str, list[Answer]]) -> None:
    assert differ_by(answers[name], answers["parent"]) < TOLERANCE


if __name__ == "__main__":
    answer(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
