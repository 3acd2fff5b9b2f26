"""Attention calls on DTensors: each rank computes the heads and batch elements that it holds.

Nothing crosses ranks, so the call is made on the local tensors and the output wrapped again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...block_masks.selectors import Selector
from .sdpa import SdpaCall

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Shard
else:
    DTensor = Shard = None  # type: ignore[assignment,misc]

BATCH, HEADS, TOKENS = 0, 1, 2
# Fields of selectors that hold a number for each query head.
PER_HEAD = ("head_thresholds", "head_top_p")
SelectorT = TypeVar("SelectorT", bound=Selector)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadShard:
    """Which heads of a call this rank holds, counted in equal shares.

    Attributes:
        index: Share of this rank.
        count: Shares; 1 where every rank holds all heads.
    """

    index: int
    count: int


def is_dtensor(tensor: object) -> bool:
    """Whether ``tensor`` is a DTensor."""
    return DTensor is not None and isinstance(tensor, DTensor)


def is_sharded(call: SdpaCall) -> bool:
    """Whether a call that holds tensors holds a DTensor."""
    # Written out: every eager call asks it several times.
    return DTensor is not None and (
        isinstance(call.query, DTensor)
        or isinstance(call.key, DTensor)
        or isinstance(call.value, DTensor)
        or isinstance(call.attn_mask, DTensor)
    )


def shards_tokens(call: SdpaCall) -> bool:
    """Whether a DTensor of the call is sharded along its tokens."""
    tensors = [t for t in (call.query, call.key, call.value) if is_dtensor(t)]
    return any(_has_shard(t, TOKENS) for t in tensors)


def splits_group(call: SdpaCall) -> bool:
    """Whether ranks hold unequal numbers of heads, or a GQA group is split over several."""
    query, key = call.query, call.key
    shares = _shares(query, HEADS)
    return bool(query.shape[1] % shares or key.shape[1] % shares)


def is_sharded_alike(call: SdpaCall) -> bool:
    """Whether query, key and value lie on one mesh, split alike over heads and batch or whole."""
    query = call.query
    if not all(is_dtensor(t) for t in (query, call.key, call.value)):
        return False
    if any((t.device_mesh, t.placements) != _layout(query) for t in (call.key, call.value)):
        return False
    splits = [p for p in query.placements if not p.is_replicate()]
    if not all(type(p) is Shard and p.dim in (BATCH, HEADS) for p in splits):
        return False
    # Autograd of a batch that ranks share unevenly is left to DTensor.
    batch_even = query.shape[0] % _shares(query, BATCH) == 0
    return batch_even and _mask_goes_along(call)


def run_on_shards(call: SdpaCall, run: Callable[[SdpaCall, HeadShard], Tensor]) -> Tensor:
    """Runs a call whose tensors are sharded alike on what this rank holds.

    Args:
        call: A call of DTensors for which `is_sharded_alike` holds.
        run: Computes the local call; gets the share of heads that it is of.

    Returns:
        The output as a DTensor that is sharded as the query is.
    """
    query = call.query
    output = run(call.map_tensors(_to_local), _head_shard(query))
    return DTensor.from_local(output, query.device_mesh, query.placements, run_check=False)


def shard_selector(selector: SelectorT, shard: HeadShard) -> SelectorT:
    """The selector for one share of the heads: what it has for each head cut to these.

    Args:
        selector: The selector of the whole call.
        shard: The share.

    Raises:
        ValueError: The shares do not divide the numbers.
    """
    assert is_dataclass(selector)
    changed: dict[str, Any] = {}
    for field in fields(selector):
        value = getattr(selector, field.name)
        if isinstance(value, Selector):
            changed[field.name] = shard_selector(value, shard)
        elif field.name in PER_HEAD and value is not None:
            if len(value) % shard.count:
                raise ValueError(
                    f"{field.name} must split evenly over {shard.count} ranks, got "
                    f"{len(value)} numbers; shard whole GQA groups"
                )
            each = len(value) // shard.count
            changed[field.name] = value[shard.index * each : (shard.index + 1) * each]
    # Dataclasses all, as `Selector` says.
    cut: Any = replace(selector, **changed)
    return cut


def _to_local(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _layout(tensor: Any) -> tuple[Any, Any]:
    return tensor.device_mesh, tensor.placements


def _has_shard(tensor: Any, dim: int) -> bool:
    return any(p.is_shard(dim) for p in tensor.placements)


def _shares(tensor: Any, dim: int) -> int:
    """Into how many shares a dimension is split."""
    shares = 1
    for mesh_dim, placement in enumerate(tensor.placements):
        if placement.is_shard(dim):
            shares *= tensor.device_mesh.size(mesh_dim)
    return shares


def _head_shard(tensor: Any) -> HeadShard:
    index, count = 0, 1
    for mesh_dim, placement in enumerate(tensor.placements):
        if placement.is_shard(HEADS):
            size = tensor.device_mesh.size(mesh_dim)
            index = index * size + tensor.device_mesh.get_local_rank(mesh_dim)
            count *= size
    return HeadShard(index=index, count=count)


def _mask_goes_along(call: SdpaCall) -> bool:
    """Whether a rank holds the part of the mask that its heads and batch elements need."""
    mask = call.attn_mask
    if mask is None:
        return True
    if not is_dtensor(mask) or mask.device_mesh != call.query.device_mesh:
        return False
    ahead = 4 - mask.dim()
    for own, placement in zip(mask.placements, call.query.placements, strict=True):
        if placement.is_replicate():
            if not own.is_replicate():
                return False
            continue
        dim = placement.dim - ahead
        broadcast = dim < 0 or mask.shape[dim] == 1
        if not (own.is_replicate() if broadcast else own.is_shard(dim)):
            return False
    return True
