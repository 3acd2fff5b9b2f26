"""What keeps Inductor's CPU flex template within what it can do.

The template raises on a pointwise operation fused behind it and cannot read a view of a linear
layer's two-dimensional output (torch 2.13); both happen in ordinary models.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V

_library = torch.library.Library("unisparse", "FRAGMENT")
_library.define("unfused(Tensor x) -> Tensor")


def own_buffers(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies that the template can read: ``contiguous`` alone may return a view."""
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in tensors)


def unfused(x: Tensor) -> Tensor:
    """Identity that keeps Inductor from fusing what follows into the kernel that made ``x``."""
    return torch.ops.unisparse.unfused(x)  # type: ignore[no-any-return]


def _copy(x: Tensor) -> Tensor:
    return x.clone()


_library.impl("unfused", _copy, "CompositeExplicitAutograd")
torch.library.register_fake("unisparse::unfused", torch.empty_like, lib=_library)


@register_lowering(torch.ops.unisparse.unfused.default, type_promotion_kind=None)
def _lower_unfused(x):  # type: ignore[no-untyped-def]
    x.realize()
    V.graph.no_fuse_buffer_names.add(x.get_name())
    return x
