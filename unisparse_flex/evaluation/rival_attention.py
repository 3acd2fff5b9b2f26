"""A model whose attention is a package of other work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rivals import LoadedRival, quiet

IMPLEMENTATION = "unisparse_rival"
# transformers matches parts of the names of its own implementations.
OTHER_SPELLINGS = {"flash": "fl", "flex": "fx"}
# By name: operators take texts, not functions.
_loaded: dict[str, LoadedRival] = {}


@torch.library.custom_op("unisparse_evaluation::rival", mutates_args=())
def _rival(query: Tensor, key: Tensor, value: Tensor, scale: float, name: str) -> Tensor:
    """A rival's causal attention: [B, Hq, S, Dv]. One operator, so that layers compile around."""
    rival = _loaded[name]
    with quiet():
        out = rival.call(query, key, value, scale).to(query.dtype).contiguous()
    if out.shape != (*query.shape[:3], value.shape[3]):
        raise ValueError(
            f"{name} must return [B, H, S, D] {(*query.shape[:3], value.shape[3])}, got "
            f"{tuple(out.shape)}"
        )
    # An operator returns none of its inputs.
    return out.clone() if out.data_ptr() in {t.data_ptr() for t in (query, key, value)} else out


@_rival.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, name: str) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


def use_rival(model: nn.Module, rival: LoadedRival) -> None:
    """Lets a rival compute the causal attention of a Hugging Face model.

    Calls under a mask, those of a sliding window for one, and those with fewer queries than keys
    are dense, as ``"sdpa"`` computes them.

    Args:
        model: Such a model; it stays so.
        rival: Which one.
    """
    from transformers import masking_utils, modeling_utils
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _loaded[rival.name] = rival
    name = f"{IMPLEMENTATION}_{rival.name}"
    for part, other in OTHER_SPELLINGS.items():
        name = name.replace(part, other)
    attention = _create_attention(rival.name, sdpa_attention_forward)
    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register(name, masking_utils.sdpa_mask)
    modeling_utils.ALL_ATTENTION_FUNCTIONS.register(name, attention)
    model.set_attn_implementation(name)  # type: ignore[operator]


def _create_attention(name: str, sdpa: Callable[..., Any]) -> Callable[..., Any]:
    def rival_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        whole = query.shape[2] == key.shape[2] and query.shape[2] > 1
        if not (causal and whole) or attention_mask is not None or dropout:
            return sdpa(
                *(module, query, key, value, attention_mask),
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                **options,
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = torch.ops.unisparse_evaluation.rival(query, key, value, scale, name)
        return out.transpose(1, 2).contiguous(), None

    return rival_attention


@contextmanager
def judged(rival: LoadedRival) -> Iterator[list[float]]:
    """Judges every call of a rival inside.

    Yields:
        A list that grows by the relative root mean square error of each call's output to dense
        attention on the same tensors.
    """
    errors: list[float] = []

    def call(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out = rival.call(query, key, value, scale)
        dense = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        ).float()
        errors.append(float((out.float() - dense).norm() / dense.norm()))
        return out

    before = _loaded.get(rival.name, rival)
    _loaded[rival.name] = LoadedRival(
        name=rival.name, version=rival.version, settings=rival.settings, call=call
    )
    try:
        yield errors
    finally:
        _loaded[rival.name] = before
