"""The KL that rounding alone makes: a dense model in bfloat16, its attention in float32 instead.

python -m bench.choice.rounding --weights FILE.gguf [--model gemma3-270m] [--tokens 32768]
    [--texts prose,code] [--seeds 0] [--ids FILE]

Queries, keys, values and outputs are bfloat16 in both. No choice of blocks that computes in
bfloat16 can be told from dense attention below that KL.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unisparse_flex.doctor import default_device
from unisparse_flex.evaluation import compute_kl, compute_perplexity

from ..record import FOLDER, Record, numbers
from .measure import Reading, encode
from .reading import IMPLEMENTATION, Chooser, attend_window, load

IN_FLOAT32 = "choice-float32"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.choice.rounding", description=__doc__)
    parser.add_argument("--model", default="gemma3-270m", help="as results call it")
    parser.add_argument("--weights", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--judged", type=int, default=1024, help="last tokens that are judged")
    parser.add_argument("--texts", default="prose,code")
    parser.add_argument("--seeds", type=numbers(int), default=(0,), help="excerpts of each text")
    parser.add_argument("--ids", type=Path, help="tokens of the texts, as bench.choice wrote them")
    parser.add_argument("--max-seconds", type=float, default=3000.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    device = default_device()
    model = load(options.weights, Chooser(), device).to(torch.bfloat16)
    register()
    record = Record.create(
        "bench.choice.rounding",
        device.type,
        options.output or FOLDER / f"choice-{options.model}-{options.tokens}-rounding.json",
        options.max_seconds,
        model=options.model,
        tokens=options.tokens,
        judged=options.judged,
    )
    record.content |= {"benchmark": "choice", "part": "rounding"}
    stored = torch.load(options.ids) if options.ids else {}
    with record.stopping():
        for text, seed in product(options.texts.split(","), options.seeds):
            if record.stop_if_over():
                return
            ids = stored[f"{text} {seed}"] if stored else encode(options, text, seed)
            ids = ids[:, : options.tokens].long().to(device)
            record.add({"text": text, "seed": seed} | judge(model, ids, options.judged))


def judge(model: Any, ids: Tensor, judged: int) -> dict[str, Any]:
    """KL and perplexity ratio of the model with attention in float32."""
    reading = Reading(model, Chooser(), ids, judged)
    model.set_attn_implementation(IN_FLOAT32)
    try:
        found = reading.read()
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
    perplexity = compute_perplexity(found, reading.targets)
    return {
        "kl": compute_kl(reading.dense, found),
        "dense_perplexity": reading.perplexity,
        "perplexity_ratio": perplexity / reading.perplexity,
    }


def register() -> None:
    """Makes dense attention in float32 known to transformers."""
    from transformers import AttentionInterface

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any
    ) -> tuple[Tensor, None]:
        scale, window = more["scaling"], more.get("sliding_window")
        tokens = (query.float(), key.float(), value.float())
        if window is None:
            # Fused kernels in float32 know no groups.
            group = query.shape[1] // key.shape[1]
            query32, key32, value32 = tokens
            found = F.scaled_dot_product_attention(
                query32,
                key32.repeat_interleave(group, 1),
                value32.repeat_interleave(group, 1),
                is_causal=True,
                scale=scale,
            )
        else:
            found = attend_window(*tokens, scale, window)
        return found.to(query.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register(IN_FLOAT32, attention)


if __name__ == "__main__":
    main()
