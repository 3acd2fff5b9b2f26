"""What the ranks' functions of several tests measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from unisparse_flex.passes import observe_calls
from unisparse_flex.passes.calls.sdpa import SdpaCall


def mesh() -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def difference(one: Tensor, other: Tensor) -> float:
    """The largest, over the largest entry of ``other``."""
    return float((one - other).abs().max() / other.abs().max())


def kept_blocks(run: Callable[[], Any]) -> list[Tensor]:
    """The blocks of every attention call that ``run()`` makes; all must be sparse."""
    found: list[Tensor] = []

    def observe(call: SdpaCall, config: Any, selection: Any, reason: Any) -> None:
        assert selection is not None, reason
        found.append(selection.keep)

    with observe_calls(observe):
        run()
    return found


def gather(tensor: Tensor, dim: int) -> Tensor:
    """Equal parts of all ranks, one behind the other."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim)
