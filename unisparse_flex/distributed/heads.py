"""`shard_heads`: settings for the heads that one rank holds."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..block_masks import Selector
from ..calibration import Calibration
from ..passes.calls import HeadShard, shard_selector
from .group import find_group

SettingsT = TypeVar("SettingsT", Selector, Calibration)


def shard_heads(
    settings: SettingsT, group: dist.ProcessGroup | DeviceMesh | None = None
) -> SettingsT:
    """Settings with the ``head_thresholds`` or ``head_top_p`` of only this rank's heads.

    For tensor parallel models whose attention sees plain tensors, which do not say which heads
    they hold; calls of DTensors do this by themselves. Other settings stay as they are.

    Args:
        settings: A selector or a calibration, of all heads.
        group: The ranks that the heads are sharded over, equal shares in order; all by default.

    Returns:
        What `optimize` takes on this rank.

    Raises:
        TypeError: ``settings`` is neither.
        ValueError: The ranks do not divide the numbers.
    """
    found = find_group(group)
    shard = HeadShard(index=dist.get_rank(found), count=dist.get_world_size(found))
    if isinstance(settings, Calibration):
        layers = {
            name: shard_selector(setting, shard) if isinstance(setting, Selector) else setting
            for name, setting in settings.layers.items()
        }
        # How many heads a module says to have may be those of all ranks, or of one.
        sizes = {name: size for name, size in settings.sizes.items() if name == "layers"}
        return replace(settings, layers=layers, sizes=sizes)
    if not isinstance(settings, Selector):
        raise TypeError(
            f"settings must be a selector or a Calibration, got {settings!r} of type "
            f"{type(settings).__name__}"
        )
    return shard_selector(settings, shard)
