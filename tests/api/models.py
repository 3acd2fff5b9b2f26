"""Small models and inputs whose attention has structure that pooling keeps.

Symbols: B batch, S tokens, E embedding, Hq/Hkv heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unisparse_flex import UniSparse

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
WIDTH = HEADS * HEAD_DIM
SELECTOR = UniSparse(block_size=32, top_p=0.5)
FINE = UniSparse(block_size=16, c_q=4, c_k=4, top_k=3)


class Attention(nn.Module):
    """Causal self-attention with grouped key heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH, bias=False)
        self.key = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.value = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            self.query.weight.mul_(3.0)
            self.key.weight.mul_(3.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        query, key, value = (
            split_heads(project(x)) for project in (self.query, self.key, self.value)
        )
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, is_causal=attn_mask is None, enable_gqa=True
        )
        return self.out(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and a small feed-forward network, both residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Transformer(nn.Module):
    """A stack of layers."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def create(cls: type[nn.Module] = Transformer, seed: int = 0, **options: Any) -> Any:
    """A module with weights of its seed, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(**options).eval()


def split_heads(x: Tensor) -> Tensor:
    """[B, S, H * D] to [B, H, S, D]."""
    return x.view(*x.shape[:-1], -1, HEAD_DIM).transpose(1, 2)


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise on a drift in steps of 8 along the dimension before the last."""
    generator = torch.Generator().manual_seed(seed)
    *leading, length, width = shape
    steps = torch.randn(*leading, -(-length // 8), width, generator=generator)
    noise = torch.randn(*leading, length, width, generator=generator)
    return (noise + 1.5 * steps.repeat_interleave(8, dim=-2)[..., :length, :]).to(dtype)


def embeddings(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Inputs of `Transformer`: [B, S, E]."""
    return tokens(batch, length, WIDTH, seed=seed)


def qkv(
    q_len: int,
    kv_len: int | None = None,
    *,
    heads: tuple[int, int] = (4, 2),
    batch: int = 1,
    head_dim: int = HEAD_DIM,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of one attention call."""
    kv_len = q_len if kv_len is None else kv_len
    shapes = (
        (batch, heads[0], q_len, head_dim),
        (batch, heads[1], kv_len, head_dim),
        (batch, heads[1], kv_len, head_dim if value_dim is None else value_dim),
    )
    query, key, value = (tokens(*s, seed=i, dtype=dtype) for i, s in enumerate(shapes))
    return query, key, value
