"""Training through sparse attention: gradients flow through the blocks that were kept.

python examples/train_sparse.py [--tokens 16384] [--steps 20]

Needs a GPU: on a CPU, FlexAttention has no backward pass, and calls that train stay dense.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import unisparse_flex
from unisparse_flex import UniSparse

SMALL = LlamaConfig(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=131072,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("train_sparse.py needs a CUDA device: the CPU kernel has no backward pass")
    torch.manual_seed(0)
    model = LlamaForCausalLM(SMALL).cuda().train()
    # Random weights attend to every block a little: top_k says how many are kept.
    unisparse_flex.optimize(model, UniSparse(top_k=8), min_length=0)
    step = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # The same tokens twice: the second half can be learned from the first alone.
    half = torch.randint(0, SMALL.vocab_size, (1, options.tokens // 2), device="cuda")
    tokens = torch.cat([half, half], dim=1)
    losses, start = [], time.perf_counter()
    for number in range(options.steps):
        if number == 1:
            # The first step compiles.
            torch.cuda.synchronize()
            start = time.perf_counter()
        loss = step(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    print(f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} after {options.steps} steps")
    print(f"{(time.perf_counter() - start) / max(options.steps - 1, 1):.3f} s a step")
    if not losses[-1] < losses[0]:
        raise SystemExit("the loss did not fall")


if __name__ == "__main__":
    main()
