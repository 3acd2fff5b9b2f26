"""Sparse decoding with transformers' ``generate``: a static cache that knows what to read of it.

Symbols: B batch, Hq/Hkv heads, S keys of the cache, n units, U keys of a unit, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

from ..block_masks.pages import (
    PROMPT_ROWS,
    DecodeSelector,
    UnitSummaries,
    estimate_masses,
    keep_units,
    pin_prompt,
)
from .transformers_attention import DECODE_LAYER

# What choosing takes for a token and layer, and copying what was chosen for each of its bytes, in
# bytes of keys and values that dense attention reads meanwhile (`bench.generation`).
CHOICE_BYTES, COPY = 6e6, 2.5
# Keys that are read where nothing was measured yet, and tokens until dense layers try again.
FIRST_DENSITY, RETRY = 0.1, 64


class SparseStaticCache(StaticCache):
    """A static cache of which every generated token reads a part, chosen for it.

    ``model.generate(..., past_key_values=SparseStaticCache(model.config, 8192, selector))`` with a
    model whose ``attn_implementation`` is a name of `register`. Prompts are read as without it;
    layers with a sliding window read all of it. For CPUs: on a GPU the plug-in of vLLM does the
    same in CUDA graphs. A layer whose cache is short, or of which most is chosen, is read whole:
    that is faster.

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
        made: list[Any] = self.layers
        for index, layer in enumerate(made):
            if type(layer) is StaticLayer:
                made[index] = SparseStaticLayer(length, selector, config)

    @property
    def density(self) -> float:
        """Keys read of those that there were, in units, over all layers and generated tokens."""
        layers = [layer for layer in self.layers if isinstance(layer, SparseStaticLayer)]
        visible = sum(layer.visible for layer in layers)
        return sum(layer.kept for layer in layers) / visible if visible else 0.0


class SparseStaticLayer(StaticLayer):
    """One layer of a `SparseStaticCache`.

    Its decisions are Python's: compiled code is interrupted for them.

    Attributes:
        selector: Which keys are read.
        length: Keys that it holds.
        kept: Units that were read, of all heads and generated tokens.
        visible: Units that there were.
    """

    def __init__(self, max_cache_len: int, selector: DecodeSelector, config: Any) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.selector = selector
        self._model_config = config
        self.length = self.kept = self.visible = 0
        self._followed = self._read_whole = 0
        self._density = FIRST_DENSITY
        self._units: list[UnitSummaries] = []
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

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes keys and values; they are summarized when a choice asks for it.

        Raises:
            RuntimeError: The last token's attention did not come here.
        """
        if self._awaits_attention:
            name = getattr(self._model_config.get_text_config(), "_attn_implementation", None)
            raise RuntimeError(
                "SparseStaticCache must be read by the attention of register(), which was not "
                f"called: the model has attn_implementation={name!r}; call "
                "model.set_attn_implementation('unisparse')"
            )
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        count = key_states.shape[2]
        self.length += count
        self._awaits_attention = count == 1
        return found

    def reset(self) -> None:
        """See transformers."""
        super().reset()
        self.length = self._followed = self._read_whole = 0
        self._density = FIRST_DENSITY
        self._awaits_attention = False
        if self.is_initialized:
            self._summarize()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See transformers."""
        pinned = [self._units[int(b)].pinned for b in beam_idx]
        super().reorder_cache(beam_idx)
        self._summarize()
        for units, stay in zip(self._units, pinned, strict=True):
            units.pinned.copy_(stay)

    @property
    def pays(self) -> bool:
        """Whether reading a part, as much as it was lately, is faster than reading everything."""
        size = self.length * (self.keys[:, :, 0].nbytes + self.values[:, :, 0].nbytes)
        return CHOICE_BYTES + COPY * self._density * size < size

    @torch.compiler.disable
    def observe(self, query: Tensor, scale: float) -> None:
        """Pins the units that the last rows of a prompt look at.

        Args:
            query: [B, Hq, S, D], rows that end at the last key.
            scale: Factor on the logits.
        """
        if not self.selector.prompt_share or self.length <= self.selector.min_keys:
            return
        count = -(-self.length // self.selector.unit)
        rows = query[:, :, -PROMPT_ROWS:].transpose(1, 2)
        for own, key, units in zip(rows, self.keys, self._units, strict=True):
            kept = pin_prompt(
                own,
                key[:, : count * self.selector.unit],
                length=self.length,
                selector=self.selector,
                scale=scale,
            )
            units.pin(torch.arange(count), kept)

    @torch.compiler.disable
    def written(self) -> tuple[Tensor, Tensor]:
        """The keys and values that were written, [B, Hkv, length, D] each."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    @torch.compiler.disable
    def attend(self, query: Tensor, attention_mask: Tensor | None, scale: float) -> Tensor | None:
        """Attention of one row to the keys that are chosen for it.

        Args:
            query: [B, Hq, 1, D].
            attention_mask: Of the whole cache, [B or 1, 1, 1, S]; hides what is not written alone.
            scale: Factor on the logits.

        Returns:
            [B, Hq, 1, D]; ``None`` where everything that was `written` is to be read.

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
        count = self.keys.shape[0] * self.keys.shape[1] * -(-self.length // self.selector.unit)
        self.visible += count
        if not self.pays:
            self._read_whole += 1
            if self._read_whole % RETRY:
                self.kept += count
                return None
        self._follow()
        before = self.kept
        rows = [
            self._attend_one(query[b, :, 0], self.keys[b], self.values[b], units, scale)
            for b, units in enumerate(self._units)
        ]
        self._density = (self.kept - before) / count
        return torch.stack(rows)[:, :, None]

    def _attend_one(
        self, query: Tensor, key: Tensor, value: Tensor, units: UnitSummaries, scale: float
    ) -> Tensor:
        """[Hq, D] of one row [Hq, D], its keys and values being [Hkv, S, D]."""
        unit, heads = self.selector.unit, key.shape[0]
        count = -(-self.length // unit)
        table = torch.arange(count, dtype=torch.int32)[None]
        lengths = torch.tensor([self.length], dtype=torch.int32)
        masses = estimate_masses(query[None], units, table, lengths, scale=scale)
        pinned = units.read_pinned(table.long())
        kept = keep_units(masses, lengths, self.selector, pinned)[0]
        counts = kept.sum(-1, keepdim=True)
        most = int(counts.max())
        self.kept += int(counts.sum())
        order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :most]
        # Units lie one after the other, head by head: whole ones are copied.
        at = (order + torch.arange(heads)[:, None] * (key.shape[1] // unit)).flatten()
        key, value = (
            tensor.reshape(-1, unit * tensor.shape[2]).index_select(0, at).view(heads, -1, width)
            for tensor, width in ((key, key.shape[2]), (value, value.shape[2]))
        )
        exists = (torch.arange(most) < counts)[..., None]
        seen = exists & (order[..., None] * unit + torch.arange(unit) < self.length)
        logits = (query.unflatten(0, (heads, -1)) * scale) @ key.mT
        logits = logits.masked_fill(~seen.flatten(1)[:, None], -torch.inf)
        return (logits.softmax(-1) @ value).flatten(0, 1)

    def _summarize(self) -> None:
        """Summaries of what the cache holds now, each unit a page."""
        setattr(self.keys, DECODE_LAYER, self)
        unit = self.selector.unit
        self._units = [UnitSummaries.create(self._in_units(key), unit) for key in self.keys]
        self._followed = 0

    def _in_units(self, key: Tensor) -> Tensor:
        """[n, Hkv, U, D], a view of keys [Hkv, S, D]."""
        return key.unflatten(1, (-1, self.selector.unit)).transpose(0, 1)

    def _follow(self) -> None:
        """Summarizes the keys that came since the last time."""
        if self._followed == self.length:
            return
        unit = self.selector.unit
        at = torch.arange(self._followed // unit, -(-self.length // unit))
        self._followed = self.length
        held = torch.arange(unit) < (self.length - at * unit)[:, None]
        for key, units in zip(self.keys, self._units, strict=True):
            keys = self._in_units(key)[at[0] : at[-1] + 1]
            units.write(keys, at, torch.zeros_like(at), held[:, None, :, None])
