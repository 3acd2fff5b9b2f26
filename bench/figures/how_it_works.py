"""Draws what choosing blocks looks like in one head of a real model.

python -m bench how_it_works [--tokens 4096] [--layer 15] [--head 4] [--output FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from unisparse_flex.block_masks import (
    BlockGeometry,
    Sampled,
    compute_block_scores,
    compute_sampled_scores,
    default_scale,
)
from unisparse_flex.selectors import DEFAULT_SELECTOR, Oracle

from ..calls import capture_smollm2

KEY_HEADS = 3
# Shares below it are drawn like it.
LEAST_SHARE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench how_it_works", description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--head", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("docs/how-it-works.png"))
    options = parser.parse_args()
    layers = capture_smollm2(options.tokens, (options.layer,), KEY_HEADS, "cpu")
    query, key, _ = (tensor.float() for tensor in layers[options.layer])
    group = query.shape[1] // KEY_HEADS
    one = slice(options.head, options.head + 1)
    kv = slice(options.head // group, options.head // group + 1)
    draw(query[:, one], key[:, kv], f"SmolLM2-135M, layer {options.layer}", options.output)
    print(f"drawn {options.output}")


def panels(query: Tensor, key: Tensor) -> tuple[dict[str, Tensor], Tensor, float]:
    """Shares of every block by name, the kept blocks and their share of the visible ones.

    Args:
        query: [1, 1, S, D].
        key: [1, 1, S, D].
    """
    length, scale = query.shape[2], default_scale(query.shape[3])
    selector = DEFAULT_SELECTOR
    geometry = BlockGeometry(
        q_len=length, kv_len=length, block_size=selector.block_size, causal_offset=0
    )
    rows = Sampled(queries=Oracle().block_size)
    sampled = Sampled(queries=selector.sampled_queries)
    shares = {
        "what blocks hold": compute_sampled_scores(
            query, key, geometry=geometry, granularity=rows, scale=scale
        ),
        "composite tokens": compute_block_scores(
            query, key, geometry=geometry, granularity=selector.granularity, scale=scale
        ),
        f"{selector.sampled_queries} rows of each block": compute_sampled_scores(
            query, key, geometry=geometry, granularity=sampled, scale=scale
        ),
    }
    selection = selector.select(query, key, is_causal=True)
    kept = {name: share[0, 0] for name, share in shares.items()}
    return kept, selection.keep[0, 0], float(selection.density())


def draw(query: Tensor, key: Tensor, title: str, path: Path) -> None:
    """Draws the panels of one head; blocks ahead of the diagonal are left white."""
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("bench.how_it_works: needs matplotlib") from error

    shares, keep, density = panels(query, key)
    ahead = torch.ones_like(keep).triu(1)
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, len(shares) + 1, sharey=True)
    norm = LogNorm(LEAST_SHARE, 1)
    for place, (name, share) in enumerate(shares.items()):
        seen = share.clamp_min(LEAST_SHARE).masked_fill(ahead, float("nan"))
        image = axes[place].imshow(seen.numpy(), norm=norm, cmap="cividis", interpolation="none")
        axes[place].set_title(name, fontsize=10)
    shown = keep.float().masked_fill(ahead, float("nan"))
    axes[-1].imshow(shown.numpy(), vmin=0, vmax=1.35, cmap="Greys", interpolation="none")
    axes[-1].set_title(f"kept: {density:.0%}", fontsize=10)
    for one in axes:
        one.set_xlabel("key block")
        one.set_xticks([])
        one.set_yticks([])
    axes[0].set_ylabel("query block")
    figure.colorbar(image, ax=axes[:-1], label="share of the row's attention", shrink=0.85)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
