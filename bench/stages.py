"""The stages of an attention call, timed one by one on one device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from unisparse_flex import UniSparse, attention
from unisparse_flex.block_masks import BlockGeometry, BlockSelection, causal_mask_mod, to_block_mask

SELECTOR = UniSparse()
GATE_LENGTH, GATE_DENSITY = 640, 0.5
MOST_REPEATS = 60
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """Query heads, key heads and head_dim of a model."""

    query: int
    key: int
    head_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What is measured on a device.

    Attributes:
        lengths: Tokens, for queries and keys alike.
        densities: Forced densities of the attention stage.
        heads: Head shapes; the whole call is timed for the first alone.
        dtypes: Dtypes.
        tile: Keys that the dense kernel reads at a time.
        least: Fewest repeats of a timing.
        budget: Seconds up to which a timing is repeated further.
    """

    lengths: tuple[int, ...]
    densities: tuple[float, ...]
    heads: tuple[Heads, ...]
    dtypes: tuple[torch.dtype, ...]
    tile: int
    least: int
    budget: float


def create_inputs(
    heads: Heads, length: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Clustered queries, keys and values, [1, H, S, D]: pieces of 32 tokens around a centre."""
    generator = torch.Generator(device).manual_seed(length)
    options: dict[str, Any] = {"generator": generator, "device": device}

    def draw(count: int) -> Tensor:
        centres = torch.randn(count, -(-length // 32), heads.head_dim, **options)
        noise = torch.randn(count, length, heads.head_dim, **options)
        drift = centres.repeat_interleave(32, dim=1)[:, :length]
        return (noise + 1.5 * drift)[None].to(dtype)

    return draw(heads.query), draw(heads.key), draw(heads.key)


def force_density(heads: int, length: int, density: float, device: str) -> BlockSelection:
    """Random causal blocks: the diagonal, and others until ``density`` of the visible are kept."""
    geometry = BlockGeometry(
        q_len=length, kv_len=length, block_size=SELECTOR.block_size, causal_offset=0
    )
    visible = geometry.visible_blocks(torch.device("cpu"))
    diagonal = geometry.local_blocks(1, torch.device("cpu"))
    forced, total = int(diagonal.sum()), int(visible.sum())
    chance = max(0.0, (density * total - forced) / max(total - forced, 1))
    generator = torch.Generator().manual_seed(length)
    draw = torch.rand(1, heads, *visible.shape, generator=generator)
    keep = ((draw < chance) | diagonal) & visible
    return BlockSelection(keep=keep.to(device), visible=visible.to(device), geometry=geometry)


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def select(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    selection = SELECTOR.select(query, key, is_causal=True)
    return selection.block_lists()


def attend(query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Tensor:
    out: Any = flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)
    return out


def whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key, value, is_causal=True, enable_gqa=True, selector=SELECTOR)


def check(heads: Heads, dtype: torch.dtype, device: str, run: Callable[..., Tensor]) -> float:
    """Correctness gate: largest relative error of ``run`` against masked SDPA in float64."""
    query, key, value = create_inputs(heads, GATE_LENGTH, dtype, device)
    selection = force_density(heads.query, GATE_LENGTH, GATE_DENSITY, device)
    output = run(query, key, value, block_mask_of(selection)).double()
    mask = selection.token_mask()
    wide = (tensor.double() for tensor in (query, key, value))
    exact = F.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True)
    error = float((output - exact).norm() / exact.norm())
    if error > TOLERANCE[dtype]:
        raise RuntimeError(f"sparse output errs by {error:.1e}, more than {TOLERANCE[dtype]:.0e}")
    return error


def block_mask_of(selection: BlockSelection) -> Any:
    return to_block_mask(selection, causal_mask_mod(selection.geometry), compute_q_blocks=False)


def measure(function: Callable[[], Any], device: str, *, least: int, budget: float) -> list[float]:
    """Seconds of each call, sorted, after warming up: ``least``, more while ``budget`` lasts.

    On CUDA between events; on the CPU those that the process computed, whatever else runs there.
    """
    clock = _time_cuda if device == "cuda" else _time_cpu
    function()
    warm_up = [clock(function) for _ in range(3 if device == "cuda" else 1)]
    affordable = int(budget / max(min(warm_up), 1e-6))
    return sorted(clock(function) for _ in range(max(least, min(affordable, MOST_REPEATS))))


def _time_cpu(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _time_cuda(function: Callable[[], Any]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


@dataclass(frozen=True, kw_only=True)
class Series:
    """The timings of one head shape and dtype.

    A row that fails holds its error instead of times.
    """

    plan: Plan
    heads: Heads
    dtype: torch.dtype
    device: str

    def stages(self) -> Iterator[dict[str, Any]]:
        """The gate, then dense, select and attend at every length and density."""
        torch._dynamo.reset()
        run = {run: torch.compile(run, dynamic=True, fullgraph=True) for run in (attend, select)}
        gate = _guarded(
            lambda: {"relative_error": check(self.heads, self.dtype, self.device, run[attend])}
        )
        yield self._row("gate", GATE_LENGTH, gate)
        for length in self.plan.lengths:
            yield self._timed("dense", length, lambda q, k, v: dense(q, k, v))
            yield self._timed("select", length, lambda q, k, v: run[select](q, k))
            for density in self.plan.densities:
                yield self._attend(run[attend], length, density)

    def whole_calls(self) -> Iterator[dict[str, Any]]:
        """The call as a user makes it, at the density that comes of itself."""
        torch._dynamo.reset()
        run = torch.compile(whole, dynamic=True, fullgraph=True)
        for length in self.plan.lengths:
            row = self._timed("whole", length, lambda q, k, v: run(q, k, v))

            def natural(length: int = length) -> dict[str, Any]:
                query, key, _ = self._inputs(length)
                return {"density": SELECTOR.select(query, key, is_causal=True).density()}

            yield row | _guarded(natural)

    def _inputs(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        return create_inputs(self.heads, length, self.dtype, self.device)

    def _attend(self, run: Any, length: int, density: float) -> dict[str, Any]:
        def forced() -> dict[str, Any]:
            selection = force_density(self.heads.query, length, density, self.device)
            mask = block_mask_of(selection)
            row = self._timed("attend", length, lambda q, k, v: run(q, k, v, mask))
            return row | {"density": selection.density()}

        return self._row("attend", length, _guarded(forced))

    def _timed(self, stage: str, length: int, function: Callable[..., Any]) -> dict[str, Any]:
        def run() -> dict[str, Any]:
            inputs, plan = self._inputs(length), self.plan
            with torch.no_grad():
                times = measure(
                    lambda: function(*inputs), self.device, least=plan.least, budget=plan.budget
                )
            p20, p50, p80 = (times[int(len(times) * part)] for part in (0.2, 0.5, 0.8))
            return {"p20": p20, "p50": p50, "p80": p80, "repeats": len(times)}

        return self._row(stage, length, _guarded(run))

    def _row(self, stage: str, length: int, more: dict[str, Any]) -> dict[str, Any]:
        heads = self.heads
        return {
            "stage": stage,
            "dtype": str(self.dtype).removeprefix("torch."),
            "q_heads": heads.query,
            "kv_heads": heads.key,
            "head_dim": heads.head_dim,
            "length": length,
            **more,
        }


def measure_all(plan: Plan, device: str) -> Iterator[dict[str, Any]]:
    """One row per stage, shape and density; whole calls, which nothing is fitted to, come last."""
    kinds = [(heads, dtype) for dtype in plan.dtypes for heads in plan.heads]
    series = [Series(plan=plan, heads=h, dtype=t, device=device) for h, t in kinds]
    for one in series:
        yield from one.stages()
    for one in series:
        if one.heads is plan.heads[0]:
            yield from one.whole_calls()


def _guarded(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``run`` returns, or the error it raised; memory is given back after one."""
    try:
        return run()
    except Exception as error:
        result = {"error": _describe(error)}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
