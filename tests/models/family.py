"""A model family in the coverage table: how to build a tiny one, and what to feed it.

Symbols: B batch, S tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unisparse_flex import UniSparse

SELECTOR = UniSparse(block_size=16, c_q=4, c_k=4, top_p=0.6)
EVERYTHING = UniSparse(block_size=16, c_q=4, c_k=4, top_p=1.0)

LENGTH = 203
VOCABULARY = 128
PADDING_TOKEN = 0
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16

QUERY_OR_KEY = re.compile(r"(^|[._])(q|k|qkv|query|key|query_key_value|Wqkv|add_[qk])(_|\.|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One row group of the table.

    Attributes:
        name: As it stands in the table.
        build: Makes the model, weights not yet set.
        inputs: Keyword arguments of a forward call.
        modes: Names of the modes that apply, keys of `modes.MODES`.
        sharpness: Factor on query and key projections; larger drops more blocks.
        note: What a reader of the table should know.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    modes: tuple[str, ...]
    sharpness: float = 2.0
    note: str = ""

    def create(self) -> Any:
        """The model in eval mode, with seeded weights whose attention is peaked."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build().eval()
        set_weights(model, self.sharpness)
        return model.requires_grad_(False)


def set_weights(model: nn.Module, sharpness: float) -> None:
    """Weights that keep activations near unit size, query and key projections ``sharpness`` up."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wanted = bool(QUERY_OR_KEY.search(name))
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
                if wanted and "norm" in name:
                    parameter.copy_(parameter * sharpness + (parameter.mean() < 0.5))
                continue
            embedding = "emb" in name or "shared" in name
            fan_in = 1 if embedding else parameter[0].numel()
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            if wanted:
                parameter.mul_(sharpness)


def token_ids(batch: int = 1, length: int = LENGTH, seed: int = 0) -> Tensor:
    """[B, S] ids in runs of eight, so that neighbours attend alike; none is the padding token."""
    generator = torch.Generator().manual_seed(seed)
    runs = torch.randint(1, VOCABULARY, (batch, -(-length // 8)), generator=generator)
    return runs.repeat_interleave(8, dim=1)[:, :length]


def smooth(*shape: int, seed: int = 0) -> Tensor:
    """Noise on a drift in steps of eight along the dimension before the last."""
    generator = torch.Generator().manual_seed(seed)
    *leading, length, width = shape
    steps = torch.randn(*leading, -(-length // 8), width, generator=generator)
    noise = torch.randn(*leading, length, width, generator=generator)
    return 0.3 * noise + steps.repeat_interleave(8, dim=-2)[..., :length, :]
