"""Attention as people write it by hand: gpt-fast's and torchtune's ways, and torch's own layers.

Symbols: B batch, S tokens, C cache, H heads, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .family import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LENGTH, VOCABULARY, Family, smooth, token_ids

CACHE = 256
MODES = ("forward", "compiled forward", "export")


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding of [B, S, H, D] at ``positions`` [S]."""
    half = x.shape[-1] // 2
    frequencies = 100.0 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angles = positions.to(x.dtype)[:, None, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class FusedAttention(nn.Module):
    """One fused projection, a preallocated cache, a bool mask over all of the cache."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.wo = nn.Linear(HIDDEN, HIDDEN, bias=False)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(1, KV_HEADS, CACHE, HEAD_DIM))

    def forward(self, x: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        kv_size = KV_HEADS * HEAD_DIM
        q, k, v = self.qkv(x).split([HIDDEN, kv_size, kv_size], dim=-1)
        q, k, v = (t.view(*t.shape[:2], -1, HEAD_DIM) for t in (q, k, v))
        q, k = rotate(q, input_pos), rotate(k, input_pos)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        k = self.k_cache.repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = self.v_cache.repeat_interleave(HEADS // KV_HEADS, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.wo(y.transpose(1, 2).contiguous().view(*x.shape[:2], HIDDEN))


class ExpandedAttention(nn.Module):
    """Separate projections, keys and values expanded to all heads, causality by flag."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.output_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, input_pos: Tensor) -> Tensor:
        b, s, _ = x.shape
        group = HEADS // KV_HEADS
        q = rotate(self.q_proj(x).view(b, s, HEADS, HEAD_DIM), input_pos).transpose(1, 2)
        k = rotate(self.k_proj(x).view(b, s, KV_HEADS, HEAD_DIM), input_pos)
        v = self.v_proj(x).view(b, s, KV_HEADS, HEAD_DIM)
        k, v = (
            t.unsqueeze(3).expand(b, s, KV_HEADS, group, HEAD_DIM).flatten(2, 3).transpose(1, 2)
            for t in (k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.output_proj(y.transpose(1, 2).reshape(b, s, -1))


class Decoder(nn.Module):
    """Two residual layers around an attention class, and logits."""

    causal_mask: Tensor

    def __init__(self, attention: type[nn.Module], *, masked: bool) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(attention() for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.output = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.masked = masked
        self.register_buffer("causal_mask", torch.ones(CACHE, CACHE, dtype=torch.bool).tril())

    def forward(self, input_ids: Tensor, input_pos: Tensor) -> Tensor:
        mask = self.causal_mask[None, None, input_pos] if self.masked else None
        x = self.tok_embeddings(input_ids)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x), mask, input_pos)
        return self.output(x)


class Multihead(nn.Module):
    """`nn.TransformerEncoder`: each layer calls F.multi_head_attention_forward."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            HIDDEN, HEADS, dim_feedforward=HIDDEN, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def _decoder_inputs() -> dict[str, Tensor]:
    return {"input_ids": token_ids(), "input_pos": torch.arange(LENGTH)}


HANDWRITTEN = (
    Family(
        name="gpt-fast style",
        build=lambda: Decoder(FusedAttention, masked=True),
        inputs=_decoder_inputs,
        modes=MODES,
        note=f"a cache of {CACHE}, a bool mask as long",
    ),
    Family(
        name="torchtune style",
        build=lambda: Decoder(ExpandedAttention, masked=False),
        inputs=_decoder_inputs,
        modes=MODES,
        note="keys and values expanded to every head",
    ),
    Family(
        name="nn.TransformerEncoder",
        build=Multihead,
        inputs=lambda: {"x": smooth(1, LENGTH, HIDDEN)},
        modes=MODES,
    ),
)
