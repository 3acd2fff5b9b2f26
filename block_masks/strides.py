"""Copies that Inductor leaves as they are."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("unisparse", "FRAGMENT")
_library.define("contiguous(Tensor[] tensors) -> Tensor[]")


def fix_strides(tensors: list[Tensor]) -> list[Tensor]:
    """Contiguous copies that no kernel is fused into and whose strides are kept.

    Inductor pads the strides of what it computes itself, and the Triton flex kernels step from
    batch to batch by heads times the stride of a head. Its C++ kernels cannot pad a comparison of
    64-bit integers that they compute on the way.
    """
    return torch.ops.unisparse.contiguous(tensors)


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]


_library.impl("contiguous", _contiguous, "CompositeExplicitAutograd")
