"""A Hugging Face model: a long prompt is read sparse, the answer is generated as ever.

python examples/huggingface_generate.py [--model PATH_OR_NAME] [--tokens 4096]

Without --model it builds a small Llama with random weights, so that nothing is downloaded: what it
generates means nothing then, how it runs does.
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or a name on the hub")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=8)
    options = parser.parse_args()
    model = load(options.model)
    prompt = torch.randint(0, model.config.vocab_size, (1, options.tokens))
    # Random weights attend to every block a little; a trained model does well with the default.
    selector = None if options.model else UniSparse(top_k=4)
    unisparse_flex.optimize(model, selector, min_length=0)
    with torch.no_grad(), unisparse_flex.reports.record_attention(model) as calls:
        answer = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=options.new_tokens,
            do_sample=False,
        )
    prefill = [call for call in calls if call.decision == "sparse"]
    density = sum(call.density or 0 for call in prefill) / len(prefill)
    print(f"{len(prefill)} attention calls of the prompt ran sparse, mean density {density:.0%}")
    print(f"{len(calls) - len(prefill)} calls of one token each stayed dense")
    print("generated:", answer[0, options.tokens :].tolist())


if __name__ == "__main__":
    main()
