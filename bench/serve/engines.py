"""Engines in this process for a Llama of random weights, and the clock of their steps."""

from __future__ import annotations

import gc
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

# Before vLLM is imported.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is served.

    Attributes:
        name: Of the model whose shape it is.
        hidden: Width.
        inner: Width of the MLP.
        heads: Query heads.
        kv_heads: Key heads.
        head_dim: Of queries, keys and values.
        vocabulary: Tokens.
        dtype: Of weights and cache.
        layers: How many; fewer than the model's.
    """

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    dtype: str
    layers: int

    def save(self, folder: Path, longest: int) -> Path:
        """Writes the configuration from which an engine draws random weights."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": longest,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "rope_theta": 500000.0,
            "torch_dtype": self.dtype,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return folder


LLAMA = Shape(
    name="Llama-3.1-8B",
    hidden=4096,
    inner=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary=32000,
    dtype="bfloat16",
    layers=8,
)
# For a look at the benchmark itself on the CPU: its figures say nothing.
TINY = replace(
    LLAMA,
    name="tiny",
    hidden=128,
    inner=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocabulary=512,
    dtype="float32",
    layers=2,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """How an engine is started.

    Attributes:
        model: Folder of the model's configuration.
        chunk: Most tokens of a step.
        longest: Most tokens of a request.
        settings: The plug-in's; ``None`` for the parent alone.
        parent: The parent's name; ``None`` on the CPU, which has one.
        dtype: Of weights and cache.
        graphs: Whether decoding runs in CUDA graphs.
        requests: Most requests in a batch.
        memory: Share of the GPU's memory that the engine takes.
        random_weights: Whether weights are drawn; else those beside the configuration are read.
    """

    model: Path
    chunk: int
    longest: int
    settings: dict[str, Any] | None
    parent: str | None
    dtype: str
    graphs: bool = False
    requests: int = 32
    # Room for two, should one not be gone when the next starts.
    memory: float = 0.4
    random_weights: bool = True

    def options(self) -> dict[str, Any]:
        """What ``vllm.LLM`` is given."""
        given: dict[str, Any] = {
            "model": str(self.model),
            # vLLM's own choice is 16 bits.
            "dtype": self.dtype,
            "load_format": "dummy" if self.random_weights else "auto",
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "max_model_len": self.longest,
            "max_num_batched_tokens": self.chunk,
            "max_num_seqs": self.requests,
            "seed": 0,
        }
        if self.parent is not None:
            given["gpu_memory_utilization"] = self.memory
            given["attention_config"] = {"backend": self.parent}
        if self.graphs:
            # Without Inductor: the engine starts in seconds, and its linear layers are cuBLAS's.
            given["compilation_config"] = {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": [
                    2**i for i in range(self.requests.bit_length()) if 2**i <= self.requests
                ],
            }
        else:
            given["enforce_eager"] = True
        if self.settings is not None:
            own = dict(self.settings)
            if self.parent is not None:
                own["parent"] = self.parent
                given["attention_config"] = {"backend": "CUSTOM"}
            given["additional_config"] = {"unisparse": own}
        return given


@contextmanager
def serve(server: Server) -> Iterator[Any]:
    """The engine, and afterwards its memory."""
    os.environ.update(ENVIRONMENT)
    # What the last engine left behind.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    from unisparse_flex.integrations.vllm import register, reset_counts

    # Where the checkout is not installed, vLLM finds no entry point.
    register()
    # The memory pool of CUDA graphs went with the engine before: each has one of its own.
    for cls in type(current_platform).__mro__:
        if "_global_graph_pool" in vars(cls):
            setattr(cls, "_global_graph_pool", None)  # noqa: B010
    engine: Any = LLM(**server.options())
    if server.random_weights:
        engine.apply_model(draw_weights)
    reset_counts()
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


@torch.no_grad()
def draw_weights(model: Any) -> None:
    """Weights of a model whose attention is peaked: what an engine draws hardly depends on it."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.dim() < 2:
            parameter.fill_(1.0)
            continue
        generator = torch.Generator(parameter.device).manual_seed(number)
        parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
        if "qkv_proj" in name:
            config = model.config
            pairs = config.num_attention_heads + config.num_key_value_heads
            parameter[: pairs * config.head_dim].mul_(2.0)


class Client:
    """Requests of random tokens, and how long an engine takes for them.

    Args:
        engine: The engine.
        vocabulary: Tokens to draw from.
    """

    def __init__(self, engine: Any, vocabulary: int) -> None:
        self.engine = engine.llm_engine
        self._vocabulary = vocabulary
        self._count = 0

    def prompt(self, length: int, seed: int) -> list[int]:
        """Random tokens; the same for every engine."""
        generator = random.Random(f"{length} {seed}")
        return generator.choices(range(3, self._vocabulary), k=length)

    def add(self, prompt: Sequence[int], tokens: int, logprobs: int | None = None) -> str:
        """Asks for so many tokens."""
        from vllm import SamplingParams

        self._count += 1
        name = str(self._count)
        wanted = SamplingParams(
            max_tokens=tokens,
            temperature=0,
            detokenize=False,
            ignore_eos=True,
            logprobs=logprobs,
        )
        self.engine.add_request(name, {"prompt_token_ids": list(prompt)}, wanted)
        return name

    def step(self) -> tuple[float, list[Any]]:
        """Seconds of one step, and its outputs."""
        start = time.perf_counter()
        outputs = self.engine.step()
        return time.perf_counter() - start, outputs

    def first_token(self, length: int, seed: int = 0) -> float:
        """Seconds from a request to its first token, of a prompt that is alone."""
        prompt = self.prompt(length, seed)
        start = time.perf_counter()
        self.add(prompt, 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return time.perf_counter() - start

    def drain(self) -> list[Any]:
        """Steps until nothing is left; the finished outputs."""
        finished = []
        while self.engine.has_unfinished_requests():
            finished += [output for output in self.engine.step() if output.finished]
        return finished


def vllm_version() -> str:
    """Of the engine that is measured."""
    import vllm

    return str(vllm.__version__)


def counts_row() -> dict[str, Any]:
    """What ran sparse since the engine started or was last asked."""
    from unisparse_flex.integrations.vllm import read_counts, reset_counts

    counts = read_counts()
    reset_counts()
    return {
        "sparse_rows": counts.sparse_rows,
        "density": round(counts.density, 4),
        "decode_rows": counts.decode_rows,
        "decode_density": round(counts.decode_density, 4),
        "dense_rows": {reason.name: count for reason, count in counts.dense_rows.items()},
    }
