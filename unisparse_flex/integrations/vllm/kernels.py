"""The parents' kernels, called on sequences of one head with page tables of their own.

Symbols: T tokens, N sequences, G query heads, P keys of a page, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .cache_view import CacheView, view_packed, view_transposed
from .reasons import Reason

# Parts into which vLLM's Triton kernel cuts keys.
PARTS = 16


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sequences:
    """Rows and keys of sequences of one key head.

    Attributes:
        query: [T, G, D], the query heads of the key head; one, or of single rows several.
        output: [T, G, D], written.
        starts: int32 [N + 1], the first row of each, and T.
        rows: Most rows of one.
        lengths: int32 [N], keys of each; the last row sees all of them.
        keys: Most keys of one, or more.
        tables: int32 [N, width], the pages of each.
        splits: Into how many parts a kernel may cut the keys of a sequence.
        schedule: From `ParentKernel.schedule` for the same numbers of sequences, rows, keys and
            parts, whatever the lengths were; ``None`` for a kernel to make it or to have none.
    """

    query: Tensor
    output: Tensor
    starts: Tensor
    rows: int
    lengths: Tensor
    keys: int
    tables: Tensor
    splits: int = 1
    schedule: Tensor | None = None


class ParentKernel(Protocol):
    """What a parent computes with, and how its cache lies."""

    name: str

    def view(self, layer: Any, cache: Tensor, unit: int | None = None) -> CacheView | Reason:
        """The cache of a layer in units of so many keys, or why it cannot be read by head.

        A layout that has no smaller units gives pages.
        """

    def attend(self, impl: Any, layer: Any, view: CacheView, sequences: Sequences) -> None:
        """Causal attention of every sequence, its last row aligned with its last key."""

    def schedule(self, impl: Any, view: CacheView, sequences: Sequences) -> Tensor | None:
        """What a kernel would compute of the lengths before it starts; ``None`` for nothing."""


class FlashKernel:
    """FlashAttention 2 to 4, as vLLM ships it."""

    name = "FLASH_ATTN"

    def view(self, layer: Any, cache: Tensor, unit: int | None = None) -> CacheView | Reason:
        """See `ParentKernel.view`."""
        impl = getattr(layer, "impl", None)
        # FlashAttention 4 was not tried on parts of a page.
        small = getattr(impl, "vllm_flash_attn_version", 3) < 4
        return view_packed(cache, unit if small else None)

    def attend(self, impl: Any, layer: Any, view: CacheView, sequences: Sequences) -> None:
        """See `ParentKernel.attend`."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        flash_attn_varlen_func(
            q=sequences.query,
            k=view.key,
            v=view.value,
            out=sequences.output,
            cu_seqlens_q=sequences.starts,
            # FlashAttention 3 has pages copied by hardware only above one tile of 128 rows.
            max_seqlen_q=sequences.rows + (sequences.rows > 1),
            seqused_k=sequences.lengths,
            max_seqlen_k=sequences.keys,
            softmax_scale=impl.scale,
            causal=True,
            window_size=[-1, -1],
            block_table=sequences.tables,
            fa_version=impl.vllm_flash_attn_version,
            num_splits=_splits(sequences, impl.vllm_flash_attn_version),
            scheduler_metadata=sequences.schedule,
        )

    def schedule(self, impl: Any, view: CacheView, sequences: Sequences) -> Tensor | None:
        """See `ParentKernel.schedule`."""
        if impl.vllm_flash_attn_version != 3:
            return None
        from vllm.v1.attention.backends.fa_utils import get_scheduler_metadata

        query, key = sequences.query, view.key
        schedule: Tensor = get_scheduler_metadata(
            batch_size=sequences.lengths.shape[0],
            max_seqlen_q=sequences.rows,
            max_seqlen_k=sequences.keys,
            num_heads_q=query.shape[1],
            num_heads_kv=key.shape[2],
            headdim=query.shape[2],
            cache_seqlens=sequences.lengths,
            qkv_dtype=query.dtype,
            cu_seqlens_q=sequences.starts,
            page_size=key.shape[1],
            causal=True,
            window_size=(-1, -1),
            num_splits=_splits(sequences, 3),
        )
        return schedule


class TritonKernel:
    """vLLM's own kernel in Triton."""

    name = "TRITON_ATTN"

    def view(self, layer: Any, cache: Tensor, unit: int | None = None) -> CacheView | Reason:
        """See `ParentKernel.view`."""
        return view_packed(cache, unit)

    def schedule(self, impl: Any, view: CacheView, sequences: Sequences) -> Tensor | None:
        """See `ParentKernel.schedule`."""
        return None

    def attend(self, impl: Any, layer: Any, view: CacheView, sequences: Sequences) -> None:
        """See `ParentKernel.attend`."""
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        scales = (sequences.lengths.shape[0], 1)
        parts: dict[str, Any] = {}
        if sequences.splits > 1:
            # Where rows are single, the keys of each may be cut into parts.
            shape = *sequences.query.shape[:2], PARTS
            width = 1 << (sequences.query.shape[2] - 1).bit_length()
            make = partial(sequences.query.new_empty, dtype=torch.float32)
            parts = {
                "seq_threshold_3D": sequences.lengths.shape[0],
                "num_par_softmax_segments": PARTS,
                "softmax_segm_output": make((*shape, width)),
                "softmax_segm_max": make(shape),
                "softmax_segm_expsum": make(shape),
            }
        unified_attention(
            q=sequences.query,
            k=view.key,
            v=view.value,
            out=sequences.output,
            cu_seqlens_q=sequences.starts,
            max_seqlen_q=sequences.rows,
            seqused_k=sequences.lengths,
            max_seqlen_k=sequences.keys,
            softmax_scale=impl.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=sequences.tables,
            softcap=0,
            q_descale=None,
            k_descale=layer._k_scale.expand(scales),
            v_descale=layer._v_scale.expand(scales),
            **parts,
        )


class CpuKernel:
    """vLLM's kernel for the CPU."""

    name = "CPU_ATTN"

    def view(self, layer: Any, cache: Tensor, unit: int | None = None) -> CacheView | Reason:
        """See `ParentKernel.view`."""
        return view_transposed(cache) if _isa(layer, cache).startswith("vec") else Reason.LAYOUT

    def schedule(self, impl: Any, view: CacheView, sequences: Sequences) -> Tensor | None:
        """See `ParentKernel.schedule`."""
        return None

    def attend(self, impl: Any, layer: Any, view: CacheView, sequences: Sequences) -> None:
        """See `ParentKernel.attend`."""
        from vllm import _custom_ops as operators

        schedule = operators.cpu_attn_get_scheduler_metadata(
            num_reqs=sequences.lengths.shape[0],
            num_heads=sequences.query.shape[1],
            num_kv_heads=1,
            head_dim=sequences.query.shape[2],
            seq_lens=sequences.lengths,
            dtype=sequences.query.dtype,
            query_start_loc=sequences.starts,
            causal=True,
            sliding_window_size=-1,
            isa=_isa(layer, view.pages),
            enable_kv_split=False,
        )
        operators.cpu_attention_with_kv_cache(
            query=sequences.query,
            key_cache=view.key,
            value_cache=view.value,
            output=sequences.output,
            query_start_loc=sequences.starts,
            seq_lens=sequences.lengths,
            scale=impl.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=sequences.tables,
            softcap=0,
            scheduler_metadata=schedule,
            s_aux=None,
        )


def _splits(sequences: Sequences, version: int) -> int:
    """Parts of the keys; FlashAttention 2 takes 0 for a choice of its own, and no other number."""
    return sequences.splits if version > 2 else int(sequences.rows > 1)


def _isa(layer: Any, cache: Tensor) -> str:
    """Which of the CPU's kernels the parent takes, and so how keys lie."""
    found = getattr(layer, "isa", None)
    if found is None:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        head_dim = layer.impl.head_size
        found = _get_attn_isa(cache.dtype, cache.shape[2], head_dim)
    return str(found)
