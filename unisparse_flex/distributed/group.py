"""The process group that an argument names."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def find_group(group: Any) -> dist.ProcessGroup:
    """A process group: itself, that of a mesh of one dimension, or that of all ranks.

    Raises:
        TypeError: ``group`` is none of the three.
        ValueError: A mesh of several dimensions.
        RuntimeError: torch.distributed is not initialised.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "group must be one of an initialised torch.distributed, got none; call "
            "torch.distributed.init_process_group first"
        )
    if group is None:
        world = dist.group.WORLD
        assert world is not None
        return world
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a mesh of one dimension, got {group.ndim}: {group}; pass the one "
                "that ranks share tokens over, mesh['context'] say"
            )
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, got {group!r}")
    return group
