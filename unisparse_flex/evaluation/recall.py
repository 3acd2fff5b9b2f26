"""What the selected blocks hold of dense attention, from a model's own queries, keys and values.

Symbols: Hq/Hkv heads, S tokens, D head_dim, N blocks, R sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..passes.calls import TORCH_SDPA, own_function

ROW_STRIDE = 16


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CapturedAttention:
    """The inputs of one causal attention call, after rotary embedding.

    Attributes:
        query: [1, Hq, S, D].
        key: [1, Hkv, S, D].
        value: [1, Hkv, S, D].
        scale: Factor on the logits; ``None`` is 1 / sqrt(D).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None


@dataclass(eq=False)
class CaptureAttention(TorchFunctionMode):
    """Keeps the inputs of every causal ``F.scaled_dot_product_attention`` call inside.

    Attributes:
        on_call: Called after each of them.
        layers: Which of them are kept, counted from 0; all by default.
        count: How many there were.
        calls: What was captured, in order.
    """

    on_call: Callable[[], None] = lambda: None
    layers: Collection[int] | None = None
    count: int = 0
    calls: list[CapturedAttention] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Passes every function on."""
        kwargs, func = kwargs or {}, own_function(func)
        output = func(*args, **kwargs)
        if func is TORCH_SDPA and kwargs.get("is_causal"):
            if self.layers is None or self.count in self.layers:
                query, key, value = args[:3]
                scale = kwargs.get("scale")
                self.calls.append(CapturedAttention(query=query, key=key, value=value, scale=scale))
            self.count += 1
            self.on_call()
        return output


def compute_recall(
    query: Tensor,
    key: Tensor,
    keep: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    row_stride: int = ROW_STRIDE,
) -> float:
    """Computes the share of dense causal attention mass that falls into kept blocks.

    Every ``row_stride``-th query row attends to all of its keys, exactly and in float32; the
    result is the mean over these rows and all heads.

    Args:
        query: [1, Hq, S, D].
        key: [1, Hkv, S, D]; Hkv divides Hq.
        keep: bool [1, Hq or 1, N, N].
        block_size: Tokens per block.
        scale: Factor on the logits; 1 / sqrt(D) by default.
        row_stride: Distance of the sampled rows; the last row of every block is one of them
            where it divides ``block_size``.

    Returns:
        A number in [0, 1].
    """
    rows = _sampled_weights(
        query, key, keep, block_size=block_size, scale=scale, row_stride=row_stride
    )
    masses = [kept.sum(-1).mean(dtype=torch.float64) for _, kept in rows]
    return float(torch.stack(masses).mean())


def compute_recall_and_error(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    row_stride: int = ROW_STRIDE,
) -> tuple[float, float]:
    """Computes recall, and how far attention over kept blocks is from dense causal attention.

    Both of the rows that `compute_recall` takes, exactly and in float32: what the selection alone
    changes, without a kernel's rounding. A row that keeps nothing has an output of zeros.

    Args:
        query: [1, Hq, S, D].
        key: [1, Hkv, S, D]; Hkv divides Hq.
        value: [1, Hkv, S, D].
        keep: bool [1, Hq or 1, N, N].
        block_size: Tokens per block.
        scale: Factor on the logits; 1 / sqrt(D) by default.
        row_stride: Distance of the sampled rows.

    Returns:
        The recall, and |sparse - dense| / |dense| over all sampled rows and heads, Frobenius norms.
    """
    group, tiny = query.shape[1] // value.shape[1], torch.finfo(torch.float32).tiny
    masses: list[Tensor] = []
    lost, whole = torch.zeros(2, dtype=torch.float64, device=query.device)
    rows = _sampled_weights(
        query, key, keep, block_size=block_size, scale=scale, row_stride=row_stride
    )
    for head, (weights, kept) in enumerate(rows):
        values = value[0, head // group].float()
        mass, dense = kept.sum(-1, keepdim=True), weights @ values
        masses.append(mass.mean(dtype=torch.float64))
        lost += (kept @ values / mass.clamp_min(tiny) - dense).double().square().sum()
        whole += dense.double().square().sum()
    return float(torch.stack(masses).mean()), float((lost / whole).sqrt())


def _sampled_weights(
    query: Tensor,
    key: Tensor,
    keep: Tensor,
    *,
    block_size: int,
    scale: float | None,
    row_stride: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Causal attention [R, S] of sampled rows, and that in kept blocks; float32, head by head."""
    heads, length, head_dim = query.shape[1:]
    scale = head_dim**-0.5 if scale is None else scale
    group = heads // key.shape[1]
    columns = torch.arange(length, device=query.device)
    rows = columns[row_stride - 1 :: row_stride]
    future = columns > rows[:, None]  # [R, S]
    keep = keep.expand(-1, heads, -1, -1)[0, :, rows // block_size]  # [Hq, R, N]
    for head in range(heads):
        logits = (query[0, head, rows] * scale).float() @ key[0, head // group].float().T
        weights = logits.masked_fill_(future, -torch.inf).softmax(-1)
        yield weights, weights * keep[head][:, columns // block_size]
