"""A compiled Hugging Face model: a long prompt is read sparse, the answer is generated as ever.

python examples/huggingface_generate.py [--model PATH_OR_NAME] [--tokens 16384]

Without --model it builds a small Llama with random weights, so that nothing is downloaded: what it
generates means nothing then, how it runs does.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import unisparse_flex
from unisparse_flex import UniSparse

SMALL = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=131072,
)


def load(name: str | None) -> Any:
    torch.manual_seed(0)
    if name is None:
        return LlamaForCausalLM(SMALL).eval()
    return AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()


def generate(model: Any, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens after the prompt."""
    found: torch.Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False
    )
    return found[0, prompt.shape[1] :]


def time_first_token(model: Any, prompt: torch.Tensor) -> float:
    """Seconds to the first token, once the model is compiled."""
    generate(model, prompt, 1)
    start = time.perf_counter()
    generate(model, prompt, 1)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or a name on the hub")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--new-tokens", type=int, default=8)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense_model, model = (load(options.model).to(device) for _ in range(2))
    prompt = torch.randint(0, model.config.vocab_size, (1, options.tokens), device=device)
    with torch.no_grad():
        dense_model.compile()
        dense = time_first_token(dense_model, prompt)
        # Random weights attend to every block a little, so that top_k says how many are kept; a
        # trained model does well with the default, and the cost model decides where it pays.
        if options.model:
            unisparse_flex.optimize(model)
        else:
            unisparse_flex.optimize(model, UniSparse(top_k=8), min_length=0)
        print(unisparse_flex.explain(model, prompt).verdict)
        model.compile()
        sparse = time_first_token(model, prompt)
        print(f"first token, compiled: dense {dense:.2f} s, sparse {sparse:.2f} s")
        print("generated:", generate(model, prompt, options.new_tokens).tolist())


if __name__ == "__main__":
    main()
