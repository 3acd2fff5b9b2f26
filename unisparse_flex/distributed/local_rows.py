"""Attention of the query rows that this rank holds.

A run of rows sees keys of all ranks. What travels for the selection is what the selector reads:
composite keys where these are all that it needs, otherwise the keys. For attention, only blocks
travel that some local row keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from ..block_masks import BlockGeometry, BlockSelection, CompositeKeys
from ..passes import DenseReason, SparseConfig
from ..passes.attend import attend_selected, logit_scale, observer_in_force
from ..passes.calls import TORCH_SDPA, SdpaCall
from ..passes.decision import flex_lowers
from .exchange import Exchange
from .layout import SequenceLayout, Span

# Keys from which a kernel is compiled for dense rows: FlashAttention-4 takes rows that end where
# their keys end, cuDNN does not, and FlashAttention-2 takes twice as long.
COMPILED_LENGTH = 32768
# Composite logits held at once where plain PyTorch scores.
LOGITS_BYTES = 2**28


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedCall:
    """One attention call of which each rank holds some tokens.

    Attributes:
        call: This rank's tokens: query [B, Hq, Sq / R, D], key and value [B, Hkv, Skv / R, D].
        config: Its settings.
        exchange: The ranks.
        q_layout: Who holds which query rows.
        kv_layout: Who holds which keys.
    """

    call: SdpaCall
    config: SparseConfig
    exchange: Exchange
    q_layout: SequenceLayout
    kv_layout: SequenceLayout

    @property
    def spans(self) -> tuple[Span, ...]:
        """The query rows of this rank."""
        return self.q_layout.spans(self.exchange.rank)

    @property
    def causal_offset(self) -> int | None:
        """Key position of query row 0 of the whole call."""
        return self.call.causal_offset(self.q_layout.length, self.kv_layout.length)

    def whole(self) -> SdpaCall:
        """The call as one process would make it, without its numbers: for decisions."""

        def extend(tensor: Tensor, length: int) -> Tensor:
            batch, heads, _, width = tensor.shape
            return tensor.new_empty(()).expand(batch, heads, length, width)

        query, key, value = self.call.query, self.call.key, self.call.value
        kv_len = self.kv_layout.length
        return replace(
            self.call,
            query=extend(query, self.q_layout.length),
            key=extend(key, kv_len),
            value=extend(value, kv_len),
        )

    def rows(self) -> Iterator[tuple[Span, Tensor]]:
        """Runs of query rows, and their queries."""
        at = 0
        for span in self.spans:
            yield span, self.call.query[:, :, at : at + span.length]
            at += span.length

    def geometry(self, rows: Span) -> BlockGeometry:
        """The block grid of some rows and all keys."""
        offset = self.causal_offset
        return BlockGeometry(
            q_len=rows.length,
            kv_len=self.kv_layout.length,
            block_size=self.config.selector.block_size,
            causal_offset=None if offset is None else offset + rows.start,
            rows_before=rows.start,
            rows_after=self.q_layout.length - rows.stop,
        )


def attend_sparse(shared: SharedCall) -> Tensor:
    """Selects for the local rows, fetches what they keep, attends.

    Returns:
        [B, Hq, Sq / R, Dv].
    """
    call, selector = shared.call, shared.config.selector
    key: Tensor | None = None
    with torch.no_grad():
        if selector.keys_per_composite is None:
            key = shared.exchange.gather(call.key, shared.kv_layout, 2, "keys")
            selections = [_select(shared, span, query, key) for span, query in shared.rows()]
        else:
            composites = _gather_composites(shared, selector.keys_per_composite)
            selections = [
                _select_from_composites(shared, span, query, composites)
                for span, query in shared.rows()
            ]
    key, value = _fetch(shared, selections, key)
    outputs = []
    observer = observer_in_force()
    for (_, query), selection in zip(shared.rows(), selections, strict=True):
        part = replace(call, query=query, key=key, value=value)
        if observer is not None:
            observer(part, shared.config, selection, None)
        outputs.append(attend_selected(part, selection, backend=shared.config.backend))
    return torch.cat(outputs, dim=2)


def attend_dense(shared: SharedCall, reason: DenseReason) -> Tensor:
    """Gathers all keys and values, and attends to every key that the local rows see.

    Returns:
        [B, Hq, Sq / R, Dv].
    """
    call = shared.call
    key = shared.exchange.gather(call.key, shared.kv_layout, 2, "keys")
    value = shared.exchange.gather(call.value, shared.kv_layout, 2, "values")
    outputs = []
    observer = observer_in_force()
    for span, query in shared.rows():
        part = replace(call, query=query, key=key, value=value)
        if observer is not None:
            observer(part, shared.config, None, reason)
        outputs.append(_attend_all(shared, span, part))
    return torch.cat(outputs, dim=2)


def _attend_all(shared: SharedCall, rows: Span, part: SdpaCall) -> Tensor:
    """Some rows and every key that they see."""
    query, key, value, geometry = part.query, part.key, part.value, shared.geometry(rows)
    is_causal, mask = geometry.causal_offset is not None, None
    long = query.device.type == "cuda" and flex_lowers(part) and key.shape[2] >= COMPILED_LENGTH
    if long and is_causal:
        visible = geometry.visible_blocks(query.device)[None, None]
        everything = BlockSelection(keep=visible, visible=visible, geometry=geometry)
        return attend_selected(part, everything, backend=shared.config.backend)
    seen = geometry.num_visible_keys(rows.length)
    if is_causal:
        mask = _causal_mask(geometry, seen, query.device)
    return TORCH_SDPA(
        query,
        key[:, :, :seen],
        value[:, :, :seen],
        attn_mask=mask,
        scale=part.scale,
        enable_gqa=bool(query.shape[1] != key.shape[1]),
    )


def _causal_mask(geometry: BlockGeometry, seen: int, device: torch.device) -> Tensor:
    offset, length = geometry.causal_offset, geometry.q_len
    assert offset is not None
    # A bias knows SDPA only by its public name, which somebody may have assigned a patch to.
    if offset + length == seen and F.scaled_dot_product_attention is TORCH_SDPA:
        bias: Tensor = causal_lower_right(length, seen)
        return bias
    # Aligned top-left with more rows than keys.
    row, key = torch.arange(length, device=device), torch.arange(seen, device=device)
    return BlockGeometry.sees_causally(row[:, None], key[None, :], offset)


def _select(shared: SharedCall, rows: Span, query: Tensor, key: Tensor) -> BlockSelection:
    return shared.config.selector.compute_selection(
        query, key, geometry=shared.geometry(rows), scale=logit_scale(shared.call), attn_mask=None
    )


def _select_from_composites(
    shared: SharedCall, rows: Span, query: Tensor, keys: CompositeKeys
) -> BlockSelection:
    """Where plain PyTorch scores, some blocks of rows at a time: their logits would not fit."""
    step = rows.length
    if keys.tokens.dtype.itemsize >= 4:
        step = _rows_at_once(shared, query, keys)
    found = []
    for start in range(0, rows.length, step):
        part = Span(rows.start + start, min(rows.start + start + step, rows.stop))
        selection = shared.config.selector.select_from_composites(
            query[:, :, start : start + part.length],
            keys,
            geometry=shared.geometry(part),
            scale=logit_scale(shared.call),
        )
        if part == rows:
            return selection
        found.append(selection)
    return BlockSelection(
        keep=torch.cat([selection.keep for selection in found], 2),
        visible=torch.cat([selection.visible for selection in found], 2),
        geometry=shared.geometry(rows),
    )


def _rows_at_once(shared: SharedCall, query: Tensor, keys: CompositeKeys) -> int:
    size, cost = shared.config.selector.block_size, shared.config.selector.cost
    heads = query.shape[0] * query.shape[1] // cost.c_h
    row_bytes = heads * keys.tokens.shape[2] * keys.tokens.itemsize
    return max(size, LOGITS_BYTES // row_bytes * cost.c_q // size * size)


def _gather_composites(shared: SharedCall, group: int) -> CompositeKeys:
    layout, key = shared.kv_layout, shared.call.key
    size = layout.block_size
    blocks = sum(span.length for span in layout.blocks(shared.exchange.rank))
    # Only the sequence's last block is ragged, and the rank that holds it holds it last.
    selector = shared.config.selector
    own = selector.pool_keys(key, blocks=blocks * (size // selector.block_size))
    tokens = shared.exchange.gather(own, layout, 2, "composites", per_block=size // group)
    groups = -(-layout.length // selector.block_size) * (selector.block_size // group)
    start = torch.arange(groups, device=key.device) * group
    counts = (layout.length - start).clamp(0, group)[None].to(_count_dtype(tokens))
    return CompositeKeys(tokens=tokens[:, :, :groups], counts=counts)


def _count_dtype(tokens: Tensor) -> torch.dtype:
    return torch.float64 if tokens.dtype is torch.float64 else torch.float32


def _fetch(
    shared: SharedCall, selections: list[BlockSelection], key: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Keys and values in the places of the whole sequence, zeros where no local row looks."""
    call, layout = shared.call, shared.kv_layout
    need = _needed_blocks(shared, selections)
    local = call.value if key is not None else torch.cat([call.key, call.value], dim=3)
    fetched = shared.exchange.fetch_blocks(local, need, layout)[:, :, : layout.length]
    if key is not None:
        return key, fetched
    head_dim = call.key.shape[3]
    return fetched[..., :head_dim], fetched[..., head_dim:]


def _needed_blocks(shared: SharedCall, selections: list[BlockSelection]) -> Tensor:
    """Blocks of the layout that some local row of a key head's group keeps: bool [B, Hkv, N]."""
    kv_heads, layout = shared.call.key.shape[1], shared.kv_layout
    heads = shared.call.query.shape[1]
    kept = torch.stack([selection.keep.any(2) for selection in selections]).any(0)
    kept = kept.expand(-1, heads, -1).unflatten(1, (kv_heads, -1)).any(2)
    finer = layout.block_size // shared.config.selector.block_size
    blocks = -(-layout.length // layout.block_size)
    kept = F.pad(kept, (0, blocks * finer - kept.shape[2]))
    return kept.unflatten(2, (blocks, finer)).any(3)
