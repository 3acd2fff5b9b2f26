"""Attention to a selection that exists already, outside any graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from ...block_masks import BlockSelection, causal_mask_mod, to_block_mask
from ..calls import SdpaCall
from ..decision import flex_backend, flex_lowers
from .cpu_tiles import widen_tiles
from .sparse_attention import attend_masked_in_chunks, kernel_options


def attend_selected(
    call: SdpaCall,
    selection: BlockSelection,
    *,
    backend: str = "auto",
    compiled: bool | None = None,
) -> Tensor:
    """Attends to the kept blocks: by a compiled flex kernel, or by masked SDPA.

    Args:
        call: The call, without a mask; ``selection.geometry`` says what is causal.
        selection: The kept blocks.
        backend: See `flex_backend`.
        compiled: Whether a kernel is compiled; by default on CUDA, where it can be.

    Returns:
        [B, Hq, Sq, Dv].
    """
    if compiled is None:
        compiled = call.query.device.type == "cuda" and flex_lowers(call)
    if not compiled:
        return attend_masked_in_chunks(call, selection)
    if call.query.device.type == "cpu":
        widen_tiles()
    geometry = selection.geometry
    mask = to_block_mask(selection, causal_mask_mod(geometry), compute_q_blocks=False)
    kernel = flex_backend(call, geometry.block_size, backend)
    options = kernel_options(geometry.block_size, backend=kernel, output_lse=False)
    # The function says itself what else the kernel writes; the operator is told.
    given = tuple(item for item in options.items() if not item[0].startswith("OUTPUT_"))
    shapes = tuple(tuple(t.shape) for t in (call.query, call.key, call.value))
    place = (geometry.causal_offset, call.scale, mask.kv_indices.shape[1])
    run = _compiled_flex(shapes, call.query.dtype, place, given)
    return run(call.query, call.key, call.value, mask)


@lru_cache(maxsize=256)
def _compiled_flex(
    _shapes: tuple[Any, ...],
    _dtype: torch.dtype,
    place: tuple[Any, ...],
    options: tuple[tuple[str, Any], ...],
) -> Callable[..., Tensor]:
    """One kernel for each shape and causal offset."""
    scale = place[1]
    given: Any = dict(options)

    def run(query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> Any:
        return flex_attention(
            query,
            key,
            value,
            block_mask=block_mask,
            scale=scale,
            enable_gqa=True,
            kernel_options=given,
        )

    # A code object of its own: Dynamo limits recompilations per code object.
    run.__code__ = run.__code__.replace(co_name="unisparse_selected")
    return torch.compile(run, fullgraph=True, dynamic=False)
