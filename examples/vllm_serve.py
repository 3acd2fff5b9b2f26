"""vLLM with sparse prefill: a prompt by vLLM alone and with the plug-in, and what ran sparse.

python examples/vllm_serve.py [--model PATH_OR_NAME] [--tokens 16384] [--chunk 8192]

Without --model it makes a small Llama with random weights, so that nothing is downloaded: what it
answers means nothing then, how it runs does. On a CPU sparse prefill is there for tests, and slower
than vLLM alone. A server takes the same settings:

vllm serve MODEL --attention-backend CUSTOM --additional-config '{"unisparse": {"quality": "high"}}'
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The engine in this process, so that its counts can be read here; a server counts in its log.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unisparse_flex.integrations.vllm import read_counts, reset_counts


def save_small_llama(folder: Path, longest: int) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=longest,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@contextmanager
def serving(model: str, options: argparse.Namespace, **more: Any) -> Iterator[Any]:
    """An engine, gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    engine: Any = LLM(
        model=model,
        skip_tokenizer_init=True,
        max_model_len=options.tokens + options.new_tokens,
        max_num_batched_tokens=options.chunk,
        max_num_seqs=4,
        gpu_memory_utilization=0.6,
        enforce_eager=True,
        # On a CPU with AMX a cache of bfloat16 has a layout that the plug-in does not read.
        dtype="auto" if torch.cuda.is_available() else "float32",
        **more,
    )
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(engine: Any, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
    """Seconds, and the answer."""
    from vllm import SamplingParams

    wanted = SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True)
    start = time.perf_counter()
    [output] = engine.generate([{"prompt_token_ids": prompt}], wanted, use_tqdm=False)
    return time.perf_counter() - start, list(output.outputs[0].token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or a name on the hub")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a step")
    options = parser.parse_args()
    # A trained model does well with the default, and the cost model decides where it pays. Random
    # weights attend to every block a little, so that top_k says how many are kept.
    settings: dict[str, Any] = {}
    if not options.model:
        settings = {"selector": "UniSparse(top_k=4)", "min_length": 0}
    sides: dict[str, dict[str, Any]] = {
        "vLLM alone": {},
        "with sparse prefill": {
            "attention_config": {"backend": "CUSTOM"},
            "additional_config": {"unisparse": settings},
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        longest = options.tokens + options.new_tokens
        model = options.model or save_small_llama(Path(folder), longest)
        prompt = random.Random(0).choices(range(3, 512), k=options.tokens)
        for name, more in sides.items():
            with serving(model, options, **more) as engine:
                # The first request compiles; prefix caching would make the second one short.
                ask(engine, prompt[::-1], 1)
                reset_counts()
                first, _ = ask(engine, prompt, 1)
                _, answer = ask(engine, prompt, options.new_tokens)
            print(f"{name}: first token {first:.2f} s, answer {answer}")
        print(read_counts().line())


if __name__ == "__main__":
    main()
