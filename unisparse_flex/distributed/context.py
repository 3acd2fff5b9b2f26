"""ContextParallel: the ranks that share the tokens of a sequence.

Symbols: B batch, Hq/Hkv heads, S tokens, D head_dim, R ranks.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..block_masks.validation import validate_block_size
from ..catching import leave_attention
from ..passes import SparseConfig
from ..passes.attend import register_context
from ..passes.calls import SdpaCall
from ..passes.decision import refuse
from .exchange import REFUSAL, Exchange, shorten
from .group import find_group
from .layout import SequenceLayout
from .local_rows import SharedCall, attend_dense, attend_sparse

SETTINGS = ("min_length", "min_queries", "dense", "strict", "backend")
_names = itertools.count()


class ContextParallel:
    """Attention over sequences whose tokens the ranks of a group share.

    Give it to `optimize`, or call `context_parallel_attention`. Every rank holds the tokens that
    `SequenceLayout` gives it, shares their attention with the others, and has all heads.

    Before each call the ranks compare what they are about to do, in one message of 1 KiB: where
    settings, shapes or layouts differ, all raise the same error. A rank that dies ends the others'
    call with an error, at once or after the group's timeout (``init_process_group(timeout=...)``).

    Args:
        group: The ranks: a process group, or a `DeviceMesh` of one dimension; all by default.
        balanced: Zig-zag, which shares causal work evenly; see `SequenceLayout`.
        block_size: Tokens per block of the layout; the selector's ``block_size`` divides it.

    Attributes:
        name: What settings call it.
        balanced: See above.
        block_size: See above.

    Raises:
        TypeError: ``group`` is neither.
        ValueError: A mesh of several dimensions, or a block size that no kernel can tile.
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        balanced: bool = True,
        block_size: int = 128,
    ) -> None:
        validate_block_size(block_size)
        self.balanced, self.block_size = balanced, block_size
        self._exchange = Exchange(find_group(group))
        self.name = f"context{next(_names)}"
        register_context(self.name, self._attend)

    @property
    def rank(self) -> int:
        """This rank, counted in the group."""
        return self._exchange.rank

    @property
    def ranks(self) -> int:
        """R."""
        return self._exchange.ranks

    @property
    def received(self) -> Counter[str]:
        """Bytes that this rank got from others since it was last cleared; see `Exchange`."""
        return self._exchange.received

    def layout(self, *pieces: int) -> SequenceLayout:
        """How a sequence is shared out.

        Args:
            *pieces: Its tokens; several numbers for a cache that grew by several prompts.
        """
        return SequenceLayout(
            pieces=pieces,
            ranks=self.ranks,
            block_size=self.block_size,
            balanced=self.balanced,
        )

    def shard(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor that holds the whole sequence along ``dim``.

        For input ids, positions (rotary embedding needs those of the whole sequence) and whatever
        else runs along the tokens.
        """
        return self.layout(tensor.shape[dim]).shard(tensor, dim, self.rank)

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The whole sequence from every rank's part, on every rank; no gradient goes through."""
        dim = dim % tensor.dim()
        shape = [size for i, size in enumerate(tensor.shape) if i != dim]
        facts = {"shape": shape, "dtype": str(tensor.dtype), "own": [tensor.shape[dim]]}
        told = self._exchange.agree(facts, tensor.device)
        layout = self.layout(sum(said["own"][0] for said in told))
        return self._exchange.gather(tensor.detach(), layout, dim, "gathered")

    def _attend(
        self, call: SdpaCall, config: SparseConfig, pieces: tuple[int, ...], refusal: str
    ) -> Tensor:
        """One attention call of local tensors."""
        if refusal:
            self._exchange.agree({REFUSAL: refusal}, call.query.device)
            raise NotImplementedError(refusal)
        # A graph may run inside an optimized model's eager forward: nothing is caught again here.
        with leave_attention():
            return self._attend_shared(self._share(call, config, pieces))

    def _attend_shared(self, shared: SharedCall) -> Tensor:
        config = shared.config
        reason = refuse(shared.whole(), config)
        if reason is not None and config.strict:
            raise NotImplementedError(
                f"sparse attention cannot run this call: {reason}; use a selector that can, or "
                "optimize a model, where such calls are dense"
            )
        if reason is not None:
            return attend_dense(shared, reason)
        return attend_sparse(shared)

    def _share(self, call: SdpaCall, config: SparseConfig, pieces: tuple[int, ...]) -> SharedCall:
        """Compares the call with those of the other ranks."""
        query, key, value = call.query, call.key, call.value
        refusal = self._find_refusal(config)
        facts: dict[str, Any] = {
            "selector": shorten(config.selector.text),
            "settings": [getattr(config, name) for name in SETTINGS],
            "layout": [self.balanced, self.block_size, list(pieces)],
            "query": [query.shape[0], query.shape[1], query.shape[3]],
            "key": [key.shape[0], key.shape[1], key.shape[3], value.shape[1], value.shape[3]],
            "dtype": str(query.dtype),
            "is_causal": call.is_causal,
            "causal_lower_right": call.causal_lower_right,
            "scale": call.scale,
            "own": [query.shape[2], key.shape[2]],
        }
        if refusal:
            facts = {REFUSAL: refusal}
        told = self._exchange.agree(facts, query.device)
        if refusal:
            raise ValueError(refusal)
        # What follows depends on what all ranks know: all raise, or none.
        q_lengths, kv_lengths = zip(*(said["own"] for said in told), strict=True)
        kv_layout = self.layout(*(pieces or (sum(kv_lengths),)))
        q_layout = self.layout(sum(q_lengths))
        for name, layout, lengths in (
            ("query", q_layout, q_lengths),
            ("key", kv_layout, kv_lengths),
        ):
            expected = [layout.local_length(rank) for rank in range(self.ranks)]
            if list(lengths) != expected:
                raise ValueError(
                    f"{name} must hold {expected} tokens on the ranks of the context, as "
                    f"ContextParallel.shard shares out {layout.length}, got {list(lengths)}; "
                    "shard the sequence with the same context"
                )
        return SharedCall(
            call=call,
            config=config,
            exchange=self._exchange,
            q_layout=q_layout,
            kv_layout=kv_layout,
        )

    def _find_refusal(self, config: SparseConfig) -> str:
        size = config.selector.block_size
        if self.block_size % size:
            return (
                f"block_size of the context must be a multiple of the selector's {size}, got "
                f"{self.block_size}; make ContextParallel(block_size={size})"
            )
        return ""
