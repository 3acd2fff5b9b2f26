"""The sparse computation that an attention call becomes: select blocks, attend to them.

Symbols: B batch, Hq/Hkv heads, Sq/Skv tokens, D head_dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ...block_masks import (
    BlockGeometry,
    BlockSelection,
    default_scale,
    to_block_mask,
)
from ...block_masks.masks import is_known, mask_4d, visible_tokens
from ..calls import TORCH_SDPA, SdpaCall, SparseConfig, is_symbolic
from ..decision import flex_backend, needs_grad

# torch itself imports what registers it.
FLEX_OPERATOR = torch.ops.higher_order.flex_attention
# Bytes of expanded mask per step where blocks are applied as a token mask.
MASK_CHUNK_BYTES = 256 * 2**20
# Scores are made for every pair of composite tokens, 1/64 of all pairs by default, whatever the
# window. A window of so few blocks costs about as much to attend to as to score and sort.
WINDOW_BLOCKS = 16


def apply_autocast(call: SdpaCall) -> SdpaCall:
    """Casts as autocast would for SDPA."""
    device = call.query.device.type
    if not torch.is_autocast_enabled(device):
        return call
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        lower = tensor.is_floating_point() and tensor.dtype is not torch.float64
        return tensor.to(dtype) if lower else tensor

    # Not what a proved mask reads: ids that differ may round to one.
    return replace(call.map_tensors(cast), mask_tensors=call.mask_tensors)


def select(call: SdpaCall, config: SparseConfig) -> BlockSelection:
    """Selects the blocks of a call that `decision.refuse` let through."""
    geometry = call_geometry(call, config)
    with torch.no_grad():
        if keeps_window(geometry):
            visible = geometry.block_bounds(call.query.device)[0]
            keep = visible.expand(call.query.shape[0], -1, -1, -1)
            return BlockSelection(keep=keep, visible=visible, geometry=geometry)
        return config.selector.compute_selection(
            call.query.detach(),
            call.key.detach(),
            geometry=geometry,
            scale=logit_scale(call),
            attn_mask=None if call.attn_mask is None else mask_4d(call.attn_mask),
        )


def call_geometry(call: SdpaCall, config: SparseConfig) -> BlockGeometry:
    """The block grid, with the mask where it was proved from the graph."""
    q_len, kv_len = call.query.shape[2], call.key.shape[2]
    offset = call.causal_offset()
    mask = call.mask_program()
    if offset is None and mask is not None:
        offset, mask = mask.split_causal()
    return BlockGeometry(
        q_len=q_len,
        kv_len=kv_len,
        block_size=config.selector.block_size,
        causal_offset=offset,
        mask=mask,
    )


def keeps_window(geometry: BlockGeometry) -> bool:
    """Whether a sliding window leaves a row so few blocks that all of them are kept.

    They are then found without any scores: ``window / block_size + 2`` blocks a row at most.
    """
    window = None if geometry.mask is None else geometry.mask.window(geometry.causal_offset)
    return window is not None and is_known(window <= (WINDOW_BLOCKS - 2) * geometry.block_size)


def attend_flex(
    call: SdpaCall, selection: BlockSelection, *, backend: str | None = None, look_up: bool = False
) -> Tensor:
    """Attends to the kept blocks through the flex_attention operator.

    Args:
        call: The call; its shapes and dtypes are ones that `decision.flex_lowers` accepts.
        selection: The kept blocks.
        backend: See `flex_backend`; ``None`` asks for none by name, and takes no other than
            FlexAttention's own.
        look_up: Repeats the selection inside ``mask_mod``, for backends that interpret the
            operator and so ignore block lists.

    Returns:
        [B, Hq, Sq, Dv].
    """
    grad = needs_grad(call)
    mask_mod, mask_buffers, score_mod, score_buffers = _modifiers(call, selection, look_up)
    block_mask = to_block_mask(
        selection,
        mask_mod,
        partial_only=look_up or call.attn_mask is not None,
        compute_q_blocks=grad,
    )
    kernel = flex_backend(call, selection.geometry.block_size, backend) if backend else "TRITON"
    output_lse = grad and call.query.device.type != "cpu"
    return FLEX_OPERATOR(
        call.query,
        call.key,
        call.value,
        score_mod,
        (*block_mask.as_tuple()[:-1], mask_mod),
        logit_scale(call),
        kernel_options(
            selection.geometry.block_size,
            backend=kernel,
            output_lse=output_lse,
        ),
        score_buffers,
        mask_buffers,
    )[0]


def restore_nan(output: Tensor, call: SdpaCall, config: SparseConfig) -> Tensor:
    """The output of torch's CPU flex kernel with the NaN that it loses: it keeps no NaN logit.

    A row of a NaN query is NaN, and so is one that sees a NaN key where only causality hides keys.
    Which keys a proved mask hides is not looked up.
    """
    lost = call.query.isnan().any(-1)
    geometry = call_geometry(call, config)
    if geometry.mask is None:
        keys = call.key.isnan().any(-1).to(torch.int32).cummax(-1).values
        offset = geometry.causal_offset
        last = torch.arange(geometry.q_len, device=keys.device)
        last = last * 0 + geometry.kv_len - 1 if offset is None else last + offset
        seen = keys.index_select(-1, last.clamp(0, geometry.kv_len - 1)) * (last >= 0)
        lost = lost | seen.repeat_interleave(output.shape[1] // keys.shape[1], dim=1).bool()
    return output.masked_fill(lost[..., None], torch.nan)


def attend_masked(
    call: SdpaCall,
    selection: BlockSelection,
    rows: slice = slice(None),
    keys: slice = slice(None),
    *,
    by_definition: bool = False,
) -> Tensor:
    """Attends to the kept blocks through SDPA with a token mask: any device, any backend, slow.

    Args:
        call: The call.
        selection: The kept blocks.
        rows: Query rows to compute; all by default.
        keys: Keys to read, at least all that ``rows`` see; all by default.
        by_definition: Whether queries or keys may hold what is not finite.

    Returns:
        [B, Hq, rows, Dv].
    """
    mask = selection.token_mask(rows, keys)
    if call.attn_mask is not None:
        own = mask_4d(call.attn_mask)
        own = own if own.shape[2] == 1 else own[:, :, rows]
        own = own if own.shape[3] == 1 else own[..., keys]
        if own.dtype is torch.bool:
            mask = mask & own
        else:
            seen = mask & visible_tokens(own)
            mask = own.to(call.query.dtype).masked_fill(~seen, -torch.inf)
    query, key, value = (_rows_apart(t) for t in (call.query, call.key, call.value))
    query, key, value = query[:, :, rows], key[:, :, keys], value[:, :, keys]
    if by_definition:
        return _attend_by_definition(query, key, value, mask, logit_scale(call))
    return TORCH_SDPA(
        query,
        key,
        value,
        attn_mask=mask,
        scale=call.scale,
        enable_gqa=bool(call.query.shape[1] != call.key.shape[1]),
    )


def _attend_by_definition(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Attention in which a hidden key's logit is nothing, whatever it is.

    Kernels add -inf to it, which leaves a NaN what it is.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    logits = (query @ key.mT) * scale
    hidden = ~mask if mask.dtype is torch.bool else mask == -torch.inf
    if mask.dtype is not torch.bool:
        logits = logits + mask
    logits = logits.masked_fill(hidden, -torch.inf)
    # A row without keys is 0.
    weights = logits.softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return weights @ value


def attend_masked_in_chunks(call: SdpaCall, selection: BlockSelection) -> Tensor:
    """`attend_masked` over chunks of query rows, so that the token mask stays small; eager only."""
    batch, heads, q_len = call.query.shape[:3]
    geometry = selection.geometry
    # One byte a pair as bool, and a copy in the query's dtype inside SDPA.
    row_bytes = batch * heads * geometry.kv_len * (1 + call.query.element_size())
    size = geometry.block_size
    chunk = max(size, MASK_CHUNK_BYTES // max(row_bytes, 1) // size * size)
    finite = bool(call.query.isfinite().all() and call.key.isfinite().all())
    outputs = []
    for start in range(0, q_len, chunk):
        stop = min(start + chunk, q_len)
        tile = slice(start, stop), slice(0, geometry.num_visible_keys(stop))
        outputs.append(attend_masked(call, selection, *tile, by_definition=not finite))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _rows_apart(tensor: Tensor) -> Tensor:
    """The tensor, copied where a token's numbers overlap the next one's.

    SDPA on the CPU hands the stride of tokens to BLAS, which takes none below the head_dim, and
    returns memory that nobody wrote.
    """
    if guard_or_false(tensor.stride(2) >= tensor.shape[3]):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def logit_scale(call: SdpaCall) -> float:
    """The factor on the logits of a call: its own, or 1 / sqrt(D)."""
    return default_scale(call.query.shape[3]) if call.scale is None else call.scale


def kernel_options(block_size: int, *, backend: str, output_lse: bool) -> dict[str, Any]:
    """Options of the flex kernel for blocks of a size."""
    options: dict[str, Any] = {
        "BACKEND": backend,
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True,
        "OUTPUT_LOGSUMEXP": output_lse,
        "OUTPUT_MAX": False,
    }
    if block_size < 128:
        # Default tiles are up to 128 wide and must divide the sparse block.
        options |= {"fwd_BLOCK_M": min(64, block_size), "fwd_BLOCK_N": min(64, block_size)}
    return options


def _modifiers(call: SdpaCall, selection: BlockSelection, look_up: bool) -> tuple[Any, ...]:
    """``mask_mod`` and ``score_mod`` with what each captures, as the operator takes them.

    Captured tensors are passed as arguments: only Dynamo could lift them out of a closure. So
    `BlockGeometry.sees`, which holds its own, cannot be used here.
    """
    offset = selection.geometry.causal_offset
    size = selection.geometry.block_size
    keep = selection.keep
    kept_heads = keep.shape[1] > 1
    program = call.mask_program()
    # The tracer of the inner graph knows no symbolic integers: they travel as tensors.
    given = is_symbolic(offset) and program is None
    numbers, tensors = ([], []) if program is None else (program.numbers, program.named)
    numbers_given = any(is_symbolic(number) for number in numbers)
    mask = None if call.attn_mask is None else mask_4d(call.attn_mask)
    additive = mask is not None and mask.dtype is not torch.bool
    at = _broadcast_index(mask) if mask is not None else None

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, *captured: Tensor) -> Tensor:
        buffers = list(captured)
        if program is not None:
            entries = [buffers.pop(0) for _ in tensors]
            given_numbers = [buffers.pop(0) for _ in numbers] if numbers_given else numbers
            allowed = program.evaluate(b, q_idx, kv_idx, tensors=entries, numbers=given_numbers)
        elif offset is None:
            # Never trivially true: a backend may drop the block lists of a trivial mask_mod.
            allowed = kv_idx >= 0
        else:
            allowed = BlockGeometry.sees_causally(
                q_idx, kv_idx, buffers.pop(0) if given else offset
            )
        if look_up:
            kept = buffers.pop(0)
            head = h if kept_heads else h * 0
            allowed = allowed & kept[b, head, q_idx // size, kv_idx // size]
        if buffers:
            assert at is not None
            allowed = allowed & buffers[0][at(b, h, q_idx, kv_idx)]
        return allowed

    def score_mod(
        score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, *captured: Tensor
    ) -> Tensor:
        if not captured:
            return score
        assert at is not None
        return score + captured[0][at(b, h, q_idx, kv_idx)]

    mask_buffers: tuple[Tensor, ...] = ()
    if given:
        assert offset is not None
        mask_buffers += (torch.full((), offset, dtype=torch.int32, device=keep.device),)
    mask_buffers += tuple(tensors)
    if numbers_given:
        mask_buffers += tuple(
            torch.full((), number, dtype=torch.int64, device=keep.device) for number in numbers
        )
    if look_up:
        mask_buffers += (keep,)
    score_buffers: tuple[Tensor, ...] = ()
    if mask is not None:
        # An additive mask also says what takes no part: -inf scores alone would leave NaN rows.
        mask_buffers += (visible_tokens(mask),)
        score_buffers = (mask,) if additive else ()
    return mask_mod, mask_buffers, score_mod, score_buffers


def _broadcast_index(mask: Tensor) -> Any:
    """Indexing of a mask [1 or B, 1 or Hq, 1 or Sq, 1 or Skv] by (b, h, q_idx, kv_idx)."""
    whole = [size != 1 for size in mask.shape]

    def index(*position: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(position, whole, strict=True)
        return tuple(at if varies else torch.zeros_like(at) for at, varies in pairs)

    return index
