"""Sparse decoding with transformers' ``generate``: a static cache that knows what to read of it.

Symbols: B batch, Hq/Hkv heads, S keys of the cache, n units, U keys of a unit, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

from ..block_masks.pages import DecodeSelector, PageSummaries, estimate_masses, keep_units
from .transformers_attention import DECODE_LAYER


class SparseStaticCache(StaticCache):  # type: ignore[misc]
    """A static cache of which every generated token reads a part, chosen for it.

    ``model.generate(..., past_key_values=SparseStaticCache(model.config, 8192, selector))`` with a
    model whose ``attn_implementation`` is a name of `register`. Prompts are read as without it;
    layers with a sliding window read all of it. For CPUs: on a GPU the plug-in of vLLM does the
    same in CUDA graphs.

    Args:
        config: The model's.
        max_cache_len: Tokens of prompt and answer together, at most; rounded up to whole units.
        selector: Which keys are read.

    Raises:
        TypeError: ``selector`` is no `DecodeSelector`.
        ValueError: It keeps everything.
    """

    def __init__(self, config: Any, max_cache_len: int, selector: DecodeSelector) -> None:
        if not isinstance(selector, DecodeSelector):
            raise TypeError(
                f"selector must be a DecodeSelector, got {selector!r}; write "
                "DecodeSelector(top_p=0.95)"
            )
        if selector.keeps_all:
            raise ValueError(
                f"selector must leave something out, got {selector.text}; give top_p, budget or "
                "share, or use transformers' StaticCache"
            )
        length = -(-max_cache_len // selector.unit) * selector.unit
        super().__init__(config=config, max_cache_len=length)
        self.layers = [
            SparseStaticLayer(length, selector) if type(layer) is StaticLayer else layer
            for layer in self.layers
        ]

    @property
    def density(self) -> float:
        """Keys read of those that dense decoding reads, in units, over all layers and tokens."""
        layers = [layer for layer in self.layers if isinstance(layer, SparseStaticLayer)]
        visible = sum(layer.visible for layer in layers)
        return sum(layer.kept for layer in layers) / visible if visible else 0.0


class SparseStaticLayer(StaticLayer):  # type: ignore[misc]
    """One layer of a `SparseStaticCache`.

    Attributes:
        selector: Which keys are read.
        length: Keys that it holds.
        kept: Units that were read, of all heads and tokens.
        visible: Units that dense decoding would have read.
    """

    # Its decisions are Python's.
    is_compileable = False

    def __init__(self, max_cache_len: int, selector: DecodeSelector) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.selector = selector
        self.length = self.kept = self.visible = 0
        self._summaries: list[PageSummaries] = []
        self._awaits_attention = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """See transformers."""
        if key_states.device.type != "cpu":
            raise NotImplementedError(
                f"SparseStaticCache must be on a CPU, got {key_states.device}: there Python would "
                "take longer than is saved; serve the model with vLLM and its decode setting"
            )
        super().lazy_initialization(key_states, value_states)
        self._summarize()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes keys and values, and brings the summaries up to date.

        Raises:
            RuntimeError: The last token's attention did not come here.
        """
        if self._awaits_attention:
            raise RuntimeError(
                "SparseStaticCache must be read by the attention of register(), which was not "
                "called; load the model with attn_implementation='unisparse', uncompiled"
            )
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        count = key_states.shape[2]
        slots = torch.arange(self.length, self.length + count)
        self.length += count
        for summaries in self._summaries:
            summaries.update(slots)
        self._awaits_attention = count == 1
        return found

    def reset(self) -> None:
        """See transformers."""
        super().reset()
        self.length = 0
        self._awaits_attention = False
        if self.is_initialized:
            self._summarize()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See transformers."""
        super().reorder_cache(beam_idx)
        self._summarize()

    def attend(self, query: Tensor, attention_mask: Tensor | None, scale: float) -> Tensor:
        """Attention of one row to the keys that are chosen for it.

        Args:
            query: [B, Hq, 1, D].
            attention_mask: Of the whole cache, [B or 1, 1, 1, S]; hides what is not written alone.
            scale: Factor on the logits.

        Returns:
            [B, Hq, 1, D].

        Raises:
            ValueError: The mask hides a key of a prompt.
        """
        self._awaits_attention = False
        if attention_mask is not None:
            own = attention_mask[..., : self.length]
            if not bool(own.all() if own.dtype == torch.bool else (own == 0).all()):
                raise ValueError(
                    "SparseStaticCache must have prompts without padding, got a mask that hides "
                    "keys; generate for prompts of one length at a time"
                )
        rows = [
            self._attend_one(query[b, :, 0], self.keys[b], self.values[b], summaries, scale)
            for b, summaries in enumerate(self._summaries)
        ]
        return torch.stack(rows)[:, :, None]

    def _attend_one(
        self, query: Tensor, key: Tensor, value: Tensor, summaries: PageSummaries, scale: float
    ) -> Tensor:
        """[Hq, D] of one row [Hq, D], its keys and values being [Hkv, S, D]."""
        unit, heads = self.selector.unit, key.shape[0]
        assert summaries.units is not None
        count = -(-self.length // unit)
        table = torch.arange(count, dtype=torch.int32)[None]
        lengths = torch.tensor([self.length], dtype=torch.int32)
        masses = estimate_masses(query[None], summaries.units, table, lengths, scale=scale)
        kept = keep_units(masses, lengths, self.selector)[0]
        counts = kept.sum(-1, keepdim=True)
        most = int(counts.max())
        self.kept += int(counts.sum())
        self.visible += heads * count
        order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :most]
        own = torch.arange(heads)[:, None]
        key, value = (
            tensor.unflatten(1, (-1, unit))[own, order].flatten(1, 2) for tensor in (key, value)
        )
        exists = (torch.arange(most) < counts)[..., None]
        seen = exists & (order[..., None] * unit + torch.arange(unit) < self.length)
        found = F.scaled_dot_product_attention(
            query.unflatten(0, (heads, -1)), key, value, seen.flatten(1)[:, None], scale=scale
        )
        return found.flatten(0, 1)

    def _summarize(self) -> None:
        """Summaries of what the cache holds now."""
        unit = self.selector.unit
        setattr(self.keys, DECODE_LAYER, self)
        self._summaries = []
        for key in self.keys:
            pages = key.unflatten(1, (-1, unit)).transpose(0, 1)
            summaries = PageSummaries.create(pages, unit, unit=unit)
            summaries.update(torch.arange(self.length))
            self._summaries.append(summaries)
