"""Padded rows of `nn.TransformerEncoder`: what the plain module returns there.

In inference it drops padding from its tensors and fills in zeros at the end, in front of its norm.
Under a function mode it does not: the layers then compute rows that nobody sees.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn


def fill_padding(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward of an `nn.TransformerEncoder`, with the plain module's padded rows."""

    @wraps(forward)
    def filled(
        self: nn.TransformerEncoder,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        output = forward(self, src, mask, src_key_padding_mask, is_causal)
        if src_key_padding_mask is None or mask is not None or not _drops_padding(self, src):
            return output
        padded = src_key_padding_mask != 0
        if self.mask_check and not torch._nested_tensor_from_mask_left_aligned(src, ~padded):
            return output
        empty = output.new_zeros((1, 1, output.shape[-1]))
        return torch.where(
            padded[..., None], empty if self.norm is None else self.norm(empty), output
        )

    return filled


def _drops_padding(encoder: nn.TransformerEncoder, src: Tensor) -> bool:
    """Whether the plain module takes padding out, as far as its mask does not say."""
    layer: Any = encoder.layers[0]
    attention = layer.self_attn
    parameters = (
        *(attention.in_proj_weight, attention.in_proj_bias),
        *(module.weight for module in (attention.out_proj, layer.norm1, layer.norm2)),
        *(module.bias for module in (attention.out_proj, layer.norm1, layer.norm2)),
        *(layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias),
    )
    return (
        torch.backends.mha.get_fastpath_enabled()
        and getattr(encoder, "use_nested_tensor", False)
        and not layer.training
        and src.dim() == 3
        and not src.is_nested
        and not (encoder.mask_check and torch.compiler.is_compiling())
        and not torch.is_autocast_enabled()
        and src.device.type in ("cpu", "cuda")
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (src, *parameters)))
    )
