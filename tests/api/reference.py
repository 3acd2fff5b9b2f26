"""Attention by its definition, over the blocks that a selector keeps.

Symbols: B batch, Hq/Hkv heads, Sq/Skv tokens, D head_dim.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unisparse_flex import Selector, restore
from unisparse_flex.block_masks import BlockGeometry
from unisparse_flex.selectors import BlockSelection


def visible(q_len: int, kv_len: int, offset: int | None, device: Any = "cpu") -> Tensor:
    """bool [Sq, Skv]: row r sees the keys up to r + offset."""
    pairs = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    return pairs if offset is None else pairs.tril(offset)


def select(
    selector: Selector,
    query: Tensor,
    key: Tensor,
    *,
    offset: int | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> BlockSelection:
    """`Selector.select` for any causal offset."""
    geometry = BlockGeometry(
        q_len=query.shape[2],
        kv_len=key.shape[2],
        block_size=selector.block_size,
        causal_offset=offset,
    )
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    with torch.no_grad():
        return selector.compute_selection(
            query, key, geometry=geometry, scale=scale, attn_mask=attn_mask
        )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    selector: Selector | None = None,
    offset: int | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Softmax attention over the selector's blocks, or over every key: [B, Hq, Sq, Dv].

    Blocks are chosen from the tensors as they are, the rest is computed in ``dtype``. A row
    without keys is 0.
    """
    mask = visible(query.shape[2], key.shape[2], offset, query.device)[None, None]
    if selector is not None:
        options: dict[str, Any] = {"offset": offset, "attn_mask": attn_mask, "scale": scale}
        mask = mask & select(selector, query, key, **options).token_mask()
    group = query.shape[1] // key.shape[1]
    query = query.to(dtype)
    key, value = (t.to(dtype).repeat_interleave(group, dim=1) for t in (key, value))
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    logits = query @ key.transpose(-1, -2) * scale
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        mask = mask & attn_mask
    elif attn_mask is not None:
        logits = logits + attn_mask.to(dtype)
        mask = mask & (attn_mask > torch.finfo(attn_mask.dtype).min)
    logits = logits.masked_fill(~mask, -math.inf)
    some = mask.any(-1, keepdim=True)
    return logits.masked_fill(~some, 0.0).softmax(-1).masked_fill(~some, 0.0) @ value


class ByDefinition(TorchFunctionMode):
    """Runs the attention calls inside through `attend`, in their own dtype; records them."""

    def __init__(self, selector: Selector | None) -> None:
        super().__init__()
        self.selector = selector
        self.calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args
        options: dict[str, Any] = {
            "offset": 0 if kwargs.get("is_causal") else None,
            "attn_mask": kwargs.get("attn_mask"),
            "scale": kwargs.get("scale"),
        }
        self.calls.append((query, key, options))
        return attend(query, key, value, selector=self.selector, dtype=query.dtype, **options)

    def densities(self) -> list[float]:
        """Density of each recorded call."""
        assert self.selector is not None
        return [select(self.selector, q, k, **options).density() for q, k, options in self.calls]


def defined_output(
    model: nn.Module,
    selector: Selector | None,
    *inputs: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """What ``model`` computes in ``dtype`` with attention over the selector's blocks."""
    plain = restore(copy.deepcopy(model)).to(dtype)
    with torch.no_grad(), ByDefinition(selector):
        return plain(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))


def rmse(output: Tensor, expected: Tensor) -> float:
    """Root of the mean square of the difference, over that of ``expected``."""
    difference = (output.double() - expected.double()).square().mean()
    return float((difference / expected.double().square().mean()).sqrt())


def assert_computes(
    output: Tensor,
    model: nn.Module,
    selector: Selector | None,
    *inputs: Tensor,
    factor: float = 3.0,
) -> None:
    """Asserts that ``output`` errs no more than plain attention of its precision does."""
    exact = defined_output(model, selector, *inputs)
    plain = defined_output(model, selector, *inputs, dtype=output.dtype)
    assert output.shape == exact.shape
    assert rmse(output, exact) <= factor * rmse(plain, exact)


def assert_is_sparse(output: Tensor, model: nn.Module, selector: Selector, *inputs: Tensor) -> None:
    """`assert_computes`, for an output that dense attention does not give."""
    assert_computes(output, model, selector, *inputs)
    assert rmse(output, defined_output(model, None, *inputs)) > 1e-2
