"""Adapters for packages of other work: one causal attention call of a whole prompt by each.

They follow the packages' public sources, which state the layouts. Symbols: B batch, Hq/Hkv heads,
S tokens, D head_dim.
"""

from __future__ import annotations

import inspect
import io
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..block_masks.installation import installed_version
from ..block_masks.validation import validate_block_size
from ..selectors import DEFAULT_SELECTOR

Call = Callable[[Tensor, Tensor, Tensor, float], Tensor]
# Of flashinfer's block-sparse wrapper, as its documentation recommends.
WORKSPACE_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """How a package is called.

    Attributes:
        name: What it is called here, and the module that is looked for.
        distribution: What may be installed under the module's name.
        functions: Where its function may lie, ``"module:name"``, the first that is there counts.
        settings: What it is given by name, the defaults that its authors publish.
        defaults: Arguments left at the function's own defaults, which are recorded.
        adapt: Makes of the function and the settings a call ``(query [B, Hq, S, D], key and value
            [B, Hkv, S, D], scale) -> [B, Hq, S, D]``.
        note: What has to be known of a comparison.
    """

    name: str
    distribution: str
    functions: tuple[str, ...]
    settings: Mapping[str, Any]
    adapt: Callable[[Any, Mapping[str, Any]], Call]
    defaults: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedRival:
    """A package that is here, ready to be called.

    Attributes:
        name: See `Rival`.
        version: Of the distribution, or what the module says of itself; ``None`` where neither
            does.
        settings: What it runs with.
        call: See `Rival.adapt`.
    """

    name: str
    version: str | None
    settings: Mapping[str, Any]
    call: Call


def quiet() -> AbstractContextManager[Any]:
    """Keeps what packages print from standard output, which is for results."""
    return redirect_stdout(io.StringIO())


def default_scaled(query: Tensor, scale: float) -> Tensor:
    """The query for a function that multiplies logits by 1 / sqrt(D) whatever it is told."""
    factor = scale * math.sqrt(query.shape[-1])
    return query if math.isclose(factor, 1.0, rel_tol=1e-6) else query * factor


def repeat_heads(query: Tensor, key: Tensor) -> Tensor:
    """Keys or values for a function that knows no grouped heads: [B, Hq, S, D]."""
    return key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def _minference(function: Any, settings: Mapping[str, Any]) -> Call:
    """``vertical_slash_sparse_attention(query, key, value [B, H, S, D], v_idx, s_idx [B, H, N])``.

    The indices are searched as ``minference_forward`` does it, by the last queries' column and
    diagonal sums; that function works on one head at a time and is part of the models' forward.
    """

    def call(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query = default_scaled(query, scale)
        key, value = repeat_heads(query, key), repeat_heads(query, value)
        columns, diagonals = _vertical_slash(query, key, **settings)
        return function(query, key, value, columns, diagonals)

    return call


def _vertical_slash(
    query: Tensor,
    key: Tensor,
    *,
    vertical_size: int,
    slash_size: int,
    last_q: int,
    forced_columns: int,
    forced_diagonals: int,
) -> tuple[Tensor, Tensor]:
    """Columns and distances back from a query, int64 [B, H, N], by the last queries."""
    length = query.shape[2]
    last = min(last_q, length)
    logits = (query[:, :, -last:] @ key.transpose(-1, -2)).float() / math.sqrt(query.shape[-1])
    row = torch.arange(length - last, length, device=query.device)[:, None]
    column = torch.arange(length, device=query.device)
    shares = logits.masked_fill(column > row, -math.inf).softmax(-1)
    columns = shares.sum(-2)
    columns[..., :forced_columns] = math.inf
    back = row - torch.arange(length, device=query.device)
    moved = shares.gather(-1, back.clamp(min=0).expand_as(shares)).masked_fill(back < 0, 0.0)
    diagonals = moved.sum(-2)
    diagonals[..., :forced_diagonals] = math.inf
    return (
        columns.topk(min(length, max(vertical_size, forced_columns)), -1).indices,
        diagonals.topk(min(length, max(slash_size, forced_diagonals)), -1).indices,
    )


def _flex_prefill(function: Any, settings: Mapping[str, Any]) -> Call:
    """``flex_prefill_attention(q [1, S, Hq, D], k, v [1, S, Hkv, D], gamma, ...)``, bfloat16."""

    def call(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        # It has a scale for attention alone, and searches at the default one.
        query = default_scaled(query, scale)
        q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in (query, key, value))
        return function(q, k, v, **settings).transpose(1, 2)

    return call


def _xattn(function: Any, settings: Mapping[str, Any]) -> Call:
    """``Xattention_prefill(query, key, value [1, H, S, D], stride, ...)``, no grouped heads."""

    def call(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query = default_scaled(query, scale)
        key, value = repeat_heads(query, key), repeat_heads(query, value)
        return function(query, key, value, **settings)

    return call


def _flash_prefill(function: Any, settings: Mapping[str, Any]) -> Call:
    """``flash_prefill(q [B, S, Hq, D], k, v [B, S, Hkv, D], out [B, S, Hq, D], ...)``."""

    def call(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        q = default_scaled(query, scale).transpose(1, 2).contiguous()
        k, v = (tensor.transpose(1, 2).contiguous() for tensor in (key, value))
        out = torch.empty_like(q)
        function(q, k, v, out, **settings)
        return out.transpose(1, 2)

    return call


def _sparge(function: Any, settings: Mapping[str, Any]) -> Call:
    """``spas_sage2_attn_meansim_topk_cuda(q, k, v [B, H, S, D], is_causal, scale, ...)``."""

    def call(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        key, value = repeat_heads(query, key), repeat_heads(query, value)
        return function(query, key, value, is_causal=True, scale=scale, **settings)

    return call


def _flashinfer(function: Any, settings: Mapping[str, Any]) -> Call:
    """``VariableBlockSparseAttentionWrapper``: plan(mask [H, Nq, Nk], ...), run(q [H, S, D], ...).

    It selects nothing: the blocks are those of this package's default selector, and every query
    head has its own. Its causality is that of a row's last kept block, the diagonal one.
    """
    size: int = settings["block_size"]

    @lru_cache(maxsize=1)
    def wrapper(device: torch.device) -> Any:
        return function(torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device))

    def call(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if query.shape[0] != 1:
            raise ValueError(f"flashinfer takes one prompt, got a batch of {query.shape[0]}")
        keep = DEFAULT_SELECTOR.select(query, key, is_causal=True, scale=scale).keep[0]
        key, value = repeat_heads(query, key), repeat_heads(query, value)
        heads, length, dim = query.shape[1:]
        sizes = torch.full((heads, keep.shape[-1]), size, dtype=torch.int32, device=query.device)
        sizes[:, -1] = length - size * (keep.shape[-1] - 1)
        planned = wrapper(query.device)
        planned.plan(
            keep.contiguous(),
            sizes,
            sizes,
            heads,
            heads,
            dim,
            causal=True,
            sm_scale=scale,
            q_data_type=query.dtype,
        )
        run = (tensor[0].contiguous() for tensor in (query, key, value))
        return planned.run(*run)[None]

    validate_block_size(size)
    return call


RIVALS = {
    rival.name: rival
    for rival in (
        Rival(
            name="minference",
            distribution="minference",
            functions=("minference:vertical_slash_sparse_attention",),
            settings={
                "vertical_size": 1000,
                "slash_size": 6096,
                "last_q": 64,
                "forced_columns": 30,
                "forced_diagonals": 100,
            },
            adapt=_minference,
            note="its kernel under the pattern that it takes for heads without one of their own; "
            "the search for columns and diagonals is this package's, of all heads at once",
        ),
        Rival(
            name="flex_prefill",
            distribution="flex-prefill",
            functions=("flex_prefill.ops.flex_prefill_attention:flex_prefill_attention",),
            settings={"gamma": 0.9, "tau": 0.1, "min_budget": 1024, "block_size": 128},
            adapt=_flex_prefill,
        ),
        Rival(
            name="xattn",
            distribution="xattn",
            functions=("xattn.src.Xattention:Xattention_prefill",),
            settings={"stride": 16, "threshold": 0.9, "norm": 1, "use_triton": True},
            adapt=_xattn,
            note="one threshold for all heads, not the thresholds by head that it has for "
            "Llama-3.1-8B; every call prints what it keeps and waits for the GPU to say so",
        ),
        Rival(
            name="flash_prefill",
            distribution="flash-prefill",
            functions=(
                "flash_prefill:flash_prefill",
                "ops.flashprefill_native_forward:flash_prefill",
            ),
            settings={
                "block_size": 128,
                "attention_sink": 2,
                "window_size": 4,
                "alpha": 0.18,
                "last_n_block_full": 2,
                "min_budget": 0,
            },
            adapt=_flash_prefill,
        ),
        Rival(
            name="spas_sage_attn",
            distribution="spas-sage-attn",
            functions=("spas_sage_attn:spas_sage2_attn_meansim_topk_cuda",),
            settings={"tensor_layout": "HND"},
            defaults=("topk", "simthreshd1", "pvthreshd", "smooth_k"),
            adapt=_sparge,
            note="it computes in 8 bits",
        ),
        Rival(
            name="flashinfer",
            distribution="flashinfer-python",
            functions=("flashinfer:VariableBlockSparseAttentionWrapper",),
            settings={"block_size": DEFAULT_SELECTOR.block_size},
            adapt=_flashinfer,
            note="its block-sparse kernel on the blocks that this package's default selector keeps",
        ),
    )
}


def load_rival(name: str) -> LoadedRival:
    """Imports a package of other work.

    Args:
        name: A name in `RIVALS`.

    Raises:
        ImportError: It is not there, or has not the function.
    """
    rival = RIVALS[name]
    with quiet():
        function = _find_function(rival)
    own = inspect.signature(function).parameters if rival.defaults else {}
    left = {n: own[n].default for n in rival.defaults if n in own}
    return LoadedRival(
        name=name,
        version=_find_version(rival),
        settings={**rival.settings, **left},
        call=rival.adapt(function, rival.settings),
    )


def _find_function(rival: Rival) -> Any:
    for place in rival.functions:
        path, _, function = place.partition(":")
        # The package alone is looked for by the name: its modules may import what is not here,
        # and that is to be said.
        if find_spec(path.partition(".")[0]) is None:
            continue
        try:
            return getattr(import_module(path), function)
        except ModuleNotFoundError as error:
            if error.name is None or not path.startswith(error.name):
                raise
        except AttributeError:
            continue
    raise ImportError(f"{rival.name} must have one of {', '.join(rival.functions)}; install it")


def _find_version(rival: Rival) -> str | None:
    found = installed_version(rival.distribution)
    if found is None:
        found = getattr(sys.modules.get(rival.name), "__version__", None)
    return None if found is None else str(found)
