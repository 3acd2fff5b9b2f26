"""How fast a device works, as `python -m bench.cost_rates` measures it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRates:
    """Rates of one kind of device in one dtype; each is a symbol of `cost_model.attention_stages`.

    Attributes:
        device: ``"cpu"``, or ``"cuda sm90"`` and the like.
        dtype: Such as ``"bfloat16"``.
        source: The file they were fitted from, or what they are an estimate from.
        dense_launch: Seconds a dense call takes beside its work.
        dense_flop_rate: FLOP/s of dense attention.
        dense_exp_rate: Exponentials a second of dense attention.
        select_launch: Seconds that scoring and selection take beside their work.
        scoring_flop_rate: FLOP/s of composite logits (float32).
        bandwidth: Bytes a second.
        sort_rate: Sort steps a second.
        sparse_launch: Seconds a call of the flex kernel takes beside its work.
        sparse_flop_rate: FLOP/s of the flex kernel.
        sparse_exp_rate: Exponentials a second of the flex kernel.
        block_seconds: Seconds a kept block of one head takes beside its work.
    """

    device: str
    dtype: str
    source: str
    dense_launch: float
    dense_flop_rate: float
    dense_exp_rate: float
    select_launch: float
    scoring_flop_rate: float
    bandwidth: float
    sort_rate: float
    sparse_launch: float
    sparse_flop_rate: float
    sparse_exp_rate: float
    block_seconds: float


@lru_cache
def device_name(kind: str, index: int | None = None) -> str:
    """The key of a device among the rates: ``"cpu"``, or ``"cuda"`` with its architecture."""
    if kind != "cuda" or not torch.cuda.is_available():
        return kind
    major, minor = torch.cuda.get_device_capability(index)
    return f"cuda sm{major}{minor}"
