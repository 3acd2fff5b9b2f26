"""Seconds of one attention call, dense and sparse, and the length from which sparse is faster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx.experimental import symbolic_shapes

from ...block_masks.masks import says_causality, says_intervals
from ...block_masks.selectors import Selector
from ..calls import SdpaCall
from . import cost_model
from .device_rates import RATE_NAMES, DeviceRates
from .found_rates import FoundRates, find_rates

# Expected density from which a call stays dense, and exact, whatever it would gain.
MOST_KEPT = 0.9
# Tiles of dense attention after a break-even at which sparse must pay too.
UNEVEN_TILES = 4
# Keys up to which a break-even is looked for.
LONGEST = 2**22
# As torch 2.13, 2.11 and those between call it; all take a fallback for sizes nobody knows.
_first_seen: Callable[..., int] = next(
    getattr(symbolic_shapes, name)
    for name in ("optimization_hint", "size_hint", "hint_int")
    if hasattr(symbolic_shapes, name)
)


class CallShape(NamedTuple):
    """What the cost model needs to know of one call.

    A tuple, not a dataclass: it is made and hashed at every eager call.

    Attributes:
        batch: Batch size.
        q_heads: Query heads.
        kv_heads: Key heads.
        q_len: Query rows.
        kv_len: Keys.
        head_dim: Of queries and keys.
        value_dim: Of values.
        is_causal: As in `SdpaCall`, by a flag or by the mask.
        causal_lower_right: As in `SdpaCall`; by a mask perhaps not up to the last key.
        masked: Whether there is a mask beside causality, of which dense attention reads all pairs.
        dtype: Of what the kernel reads.
        device: Kind and index.
        plain: Whether plain PyTorch selects, since no GPU kernel reads the mask.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    is_causal: bool
    causal_lower_right: bool
    masked: bool
    dtype: torch.dtype
    device: torch.device
    plain: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What the cost model expects of one call.

    Attributes:
        dense_seconds: Dense attention.
        select_seconds: Scoring and selection.
        attend_seconds: Attention to the kept blocks.
        density: Kept over visible blocks that were assumed.
        around_seconds: What a model computes at least between two such calls.
        host_seconds: What Python takes to launch the call, dense and sparse; 0 where it waits.
    """

    dense_seconds: float
    select_seconds: float
    attend_seconds: float
    density: float
    around_seconds: float = 0.0
    host_seconds: tuple[float, float] = (0.0, 0.0)

    @property
    def sparse_seconds(self) -> float:
        """Selection and attention."""
        return self.select_seconds + self.attend_seconds

    @property
    def is_sparse_faster(self) -> bool:
        """Whether a model with such calls is faster where they are sparse.

        Python launches while the device works: the slower of the two is what a layer takes.
        """
        dense, sparse = (
            max(seconds + self.around_seconds, host)
            for seconds, host in zip(
                (self.dense_seconds, self.sparse_seconds), self.host_seconds, strict=True
            )
        )
        return sparse < dense

    @property
    def pays(self) -> bool:
        """Whether such calls are to be sparse: faster, and by what they drop.

        A sparse kernel may be faster than the dense one even where it reads nearly all blocks;
        such a call changes the output for a few percent.
        """
        return self.is_sparse_faster and self.density < MOST_KEPT


def call_shape(call: SdpaCall) -> CallShape:
    """The shape of a call; symbolic sizes as they were first seen (they steer only speed)."""
    # Not autocast's dtype: tracing, the pass and lowering must see the same call.
    query, key = call.query, call.key
    batch, q_heads, q_len, head_dim = query.shape
    flags = bool(call.is_causal), bool(call.causal_lower_right)
    if call.mask and not any(flags):
        flags = _says_causality(call.mask)
    return CallShape(
        batch=_size(batch),
        q_heads=_size(q_heads),
        kv_heads=_size(key.shape[1]),
        q_len=_size(q_len),
        kv_len=_size(key.shape[2]),
        head_dim=_size(head_dim),
        value_dim=_size(call.value.shape[3]),
        is_causal=flags[0],
        causal_lower_right=flags[1],
        masked=call.attn_mask is not None or bool(call.mask),
        dtype=query.dtype,
        device=query.device,
        plain=call.attn_mask is not None or not _kernels_read(call),
    )


def _kernels_read(call: SdpaCall) -> bool:
    """Whether no proved mask keeps the GPU kernels from selecting."""
    if not call.mask:
        return True
    return call.query.device.type == "cuda" and _says_intervals(call.mask)


_says_intervals = lru_cache(maxsize=1024)(says_intervals)
_says_causality = lru_cache(maxsize=1024)(says_causality)


def _size(size: Any) -> int:
    return size if type(size) is int else _first_seen(size, fallback=1)


@lru_cache(maxsize=4096)
def forecast(shape: CallShape, selector: Selector, density: float | None = None) -> Forecast:
    """Predicts a call that the flex kernel can run; cached.

    Args:
        shape: The call.
        selector: Which blocks are kept.
        density: Kept over visible blocks where that was measured; the selector's own estimate by
            default.
    """
    return forecast_at(shape, selector, rates_of(shape, selector).rates, density)


def rates_of(shape: CallShape, selector: Selector) -> FoundRates:
    """The rates of a call: its selection runs by GPU kernels, or by plain PyTorch."""
    plain = shape.plain or not selector.cost.has_kernels
    return find_rates(shape.device, shape.dtype, plain=plain)


def forecast_at(
    shape: CallShape, selector: Selector, rates: DeviceRates, density: float | None = None
) -> Forecast:
    """`forecast` with the rates of a device that need not be here."""
    cost, block_size = selector.cost, selector.block_size
    if density is None:
        density = cost.density(
            q_len=shape.q_len,
            kv_len=shape.kv_len,
            block_size=block_size,
            is_causal=shape.is_causal,
            causal_lower_right=shape.causal_lower_right,
        )
    offset = max(shape.kv_len - shape.q_len, 0) if shape.causal_lower_right else 0
    flags = int(shape.masked), int(rates.is_plain)
    sizes = (*shape[:7], offset, *flags, shape.dtype.itemsize)
    composite = (cost.c_q, cost.c_k, cost.c_h, cost.sampled_queries)
    settings = (block_size, *composite, density, rates.tile)
    causal = shape.is_causal or shape.causal_lower_right
    seconds = dict(
        zip(_STAGES, _seconds(causal)(*sizes, *settings, *rates.values().values()), strict=True)
    )
    # Of a device on which that was not measured a mask costs dense attention its bytes.
    is_masked = shape.masked and rates.masked_flop_rate > 0
    return Forecast(
        dense_seconds=seconds["masked" if is_masked else "dense"],
        select_seconds=seconds["select"],
        attend_seconds=seconds["attend"],
        density=density,
        around_seconds=seconds["projections"],
        host_seconds=(rates.dense_host_seconds, rates.sparse_host_seconds),
    )


_STAGES = ("dense", "masked", "select", "attend", "projections")


@lru_cache
def _seconds(causal: bool) -> Callable[..., tuple[float, ...]]:
    """The model's stages as one function of plain numbers."""
    stages = cost_model.attention_stages(causal=causal)
    arguments = [
        *cost_model.SHAPE,
        *cost_model.SETTINGS,
        *(sympy.Symbol(name) for name in RATE_NAMES),
    ]
    expressions = [stages[name].seconds for name in _STAGES]
    return sympy.lambdify(arguments, expressions, modules="math", cse=True)


def break_even_length(shape: CallShape, selector: Selector, *, self_attention: bool) -> int | None:
    """The fewest keys from which sparse is predicted to pay, or ``None`` where it never does.

    Args:
        shape: The call; its ``kv_len`` does not matter.
        selector: Which blocks are kept.
        self_attention: Whether there are as many queries as keys, at every length; otherwise
            there are ``shape.q_len``.

    Returns:
        A multiple of the block size, from which sparse pays at every length.
    """
    q_len = 0 if self_attention else shape.q_len
    return _break_even_length(shape._replace(q_len=q_len, kv_len=0), selector, self_attention)


@lru_cache(maxsize=1024)
def _break_even_length(shape: CallShape, selector: Selector, self_attention: bool) -> int | None:
    rates = rates_of(shape, selector).rates
    return break_even_length_at(shape, selector, rates, self_attention=self_attention)


def break_even_length_at(
    shape: CallShape, selector: Selector, rates: DeviceRates, *, self_attention: bool
) -> int | None:
    """`break_even_length` with the rates of a device that need not be here."""
    size = selector.block_size

    def pays(blocks: int) -> bool:
        length = blocks * size
        q_len = length if self_attention else shape.q_len
        found = forecast_at(shape._replace(q_len=q_len, kv_len=length), selector, rates)
        return found.pays

    aligned = not self_attention and shape.causal_lower_right
    first = -(-shape.q_len // size) if aligned else 1
    high = max(LONGEST // size, first)
    if not pays(high):
        return None
    low = high
    while low >= first and pays(low):
        high, low = low, max(low * 7 // 8, first - 1)
    while high - low > 1:
        middle = (high + low) // 2
        high, low = (middle, low) if pays(middle) else (high, middle)
    # A gain that is small may be lost again where dense attention fills its tiles better.
    step = 0
    while step < UNEVEN_TILES * max(rates.tile // size, 1):
        high, step = (high, step + 1) if pays(high + step) else (high + step + 1, 0)
        if high > LONGEST // size:
            return None
    return high * size
