"""The stages of an attention call, their inputs, and the gate that they pass first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from unisparse_flex import UniSparse, attention
from unisparse_flex.block_masks import BlockGeometry, BlockSelection, causal_mask_mod, to_block_mask

SELECTOR = UniSparse.paper()
GATE_LENGTH, GATE_DENSITY = 640, 0.5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """Query heads, key heads and head_dim of a model."""

    query: int
    key: int
    head_dim: int


def create_inputs(
    heads: Heads, length: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Clustered queries, keys and values, [1, H, S, D]: pieces of 32 tokens around a centre.

    Drawn head by head: a million tokens of all heads in float32 would not fit beside the rest.
    """
    generator = torch.Generator(device).manual_seed(length)
    options: dict[str, Any] = {"generator": generator, "device": device}

    def draw(count: int) -> Tensor:
        out = torch.empty(1, count, length, heads.head_dim, dtype=dtype, device=device)
        for head in range(count):
            centres = torch.randn(-(-length // 32), heads.head_dim, **options)
            noise = torch.randn(length, heads.head_dim, **options)
            drift = centres.repeat_interleave(32, dim=0)[:length]
            out[0, head] = noise.add_(drift, alpha=1.5)
        return out

    return draw(heads.query), draw(heads.key), draw(heads.key)


def force_density(heads: int, length: int, density: float, device: str) -> BlockSelection:
    """Random causal blocks: diagonal and first, and others until ``density`` of the visible."""
    place = torch.device(device)
    geometry = BlockGeometry(
        q_len=length, kv_len=length, block_size=SELECTOR.block_size, causal_offset=0
    )
    visible = geometry.visible_blocks(place)
    forced = geometry.local_blocks(1, place)
    forced[:, 0] = True
    kept, total = int(forced.sum()), int(visible.sum())
    chance = max(0.0, (density * total - kept) / max(total - kept, 1))
    generator = torch.Generator(place).manual_seed(length)
    draw = torch.rand(1, heads, *visible.shape, generator=generator, device=place)
    keep = ((draw < chance) | forced) & visible
    return BlockSelection(keep=keep, visible=visible, geometry=geometry)


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def select(query: Tensor, key: Tensor, selector: UniSparse = SELECTOR) -> tuple[Tensor, ...]:
    selection = selector.select(query, key, is_causal=True)
    return selection.block_lists()


def attend(query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Tensor:
    out: Any = flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)
    return out


def whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key, value, is_causal=True, enable_gqa=True, selector=SELECTOR)


def check(heads: Heads, dtype: torch.dtype, device: str, run: Callable[..., Tensor]) -> float:
    """Correctness gate: largest relative error of ``run`` against masked SDPA in float64."""
    query, key, value = create_inputs(heads, GATE_LENGTH, dtype, device)
    selection = force_density(heads.query, GATE_LENGTH, GATE_DENSITY, device)
    output = run(query, key, value, block_mask_of(selection)).double()
    mask = selection.token_mask()
    exact = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask, enable_gqa=True
    )
    error = float((output - exact).norm() / exact.norm())
    if error > TOLERANCE[dtype]:
        raise RuntimeError(f"sparse output errs by {error:.1e}, more than {TOLERANCE[dtype]:.0e}")
    return error


def block_mask_of(selection: BlockSelection) -> Any:
    return to_block_mask(selection, causal_mask_mod(selection.geometry), compute_q_blocks=False)
