"""`validate_same_settings`: whether every rank optimized its model alike."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..catching import CONFIG_ATTRIBUTE, original_module
from .exchange import Exchange
from .group import find_group


def validate_same_settings(
    model: nn.Module, group: dist.ProcessGroup | DeviceMesh | None = None
) -> None:
    """Raises on every rank where ranks optimized ``model`` with different settings.

    A collective; call it once after `optimize` in tensor, data or pipeline parallel training or
    serving, where nothing else would notice: ranks that keep different blocks of the same heads
    give answers that no process alone would give. Context parallel calls compare by themselves.

    Args:
        model: The model, compiled or not.
        group: The ranks; all by default.

    Raises:
        ValueError: Modules, or their settings, differ; the same text on every rank.
        RuntimeError: A rank died, or did not come within the group's timeout.
    """
    exchange = Exchange(find_group(group))
    settings = {
        name: module.__dict__.get(CONFIG_ATTRIBUTE)
        for name, module in original_module(model).named_modules()
    }
    kinds: dict[str | None, str] = {}
    for name, config in settings.items():
        kinds.setdefault(config, name)
    shown = [f"{name or 'model'}: {config}"[:300] for config, name in kinds.items()][:2]
    digest = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:16]
    facts: dict[str, Any] = {"settings": digest, "own": shown}
    told = exchange.tell(facts, _device_of(exchange))
    digests = [said["settings"] for said in told]
    if len(set(digests)) > 1:
        listed = "; ".join(f"rank {rank}: {said['own']}" for rank, said in enumerate(told))
        raise ValueError(
            "model must be optimized with the same settings on every rank, got "
            f"{len(set(digests))} different ones ({listed}); call optimize alike everywhere"
        )


def _device_of(exchange: Exchange) -> torch.device:
    if dist.get_backend(exchange.group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
