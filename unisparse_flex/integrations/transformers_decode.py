"""Sparse decoding with transformers' ``generate``: a static cache that knows what to read of it.

Symbols: B batch, Hq/Hkv heads, S keys of the cache, n units, U keys of a unit, D head_dim.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

from ..block_masks import kernels
from ..block_masks.pages import (
    PROMPT_ROWS,
    DecodeSelector,
    UnitSummaries,
    estimate_masses,
    keep_units,
    pin_prompt,
)
from ..counted import counted
from ..optimization import registered_names
from ..passes.decision import flex_supports
from ..shares import say_share
from .transformers_attention import DECODE_LAYER
from .transformers_decode_device import DeviceReader, padding_error
from .transformers_names import cache_name

# What choosing takes for a token and layer, and copying what was chosen for each of its bytes, in
# bytes of keys and values that dense attention reads meanwhile (`bench.generation`).
CHOICE_BYTES, COPY = 6e6, 2.5
# Kinds of devices that are not waited for.
DEVICES = ("cuda",)
# Keys that are read where nothing was measured yet, and tokens until dense layers try again.
FIRST_DENSITY, RETRY = 0.1, 64


class SparseStaticCache(StaticCache):
    """A static cache of which every generated token reads a part, chosen for it.

    ``model.generate(..., cache=SparseStaticCache(model.config, 8192, selector))`` (before
    transformers 5.24 ``past_key_values=``; `as_argument` is either) with a model whose
    ``attn_implementation`` is a name of `register`. Prompts are read as without it;
    layers with a sliding window read all of it. On a CPU a layer whose cache is short, or of which
    most is chosen, is read whole: that is faster. On a GPU graphs hold the choice, those of
    ``generate`` too, and a small cache is read whole whatever it holds. `reason` says by which
    rule layers are read whole, and its number.

    Args:
        config: The model's.
        max_cache_len: Tokens of prompt and answer together, at most; rounded up to whole units.
            More raise ValueError, but for those that a graph on a GPU generates: it does not count.
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
    def as_argument(self) -> dict[str, SparseStaticCache]:
        """The cache by the name that ``generate`` and models of this transformers have for it.

        ``model.generate(..., **cache.as_argument)``: ``cache`` from 5.24 on, ``past_key_values``
        before.
        """
        return {cache_name(): self}

    @property
    def density(self) -> float | None:
        """Keys read of those that there were, in units, over all layers and generated tokens.

        ``None`` before a token is generated, and of a model without full attention, whose windows
        are read whole. On a GPU over the layers of which a part is read, and 1 without any; it
        waits for the GPU.
        """
        layers = [layer for layer in self.layers if isinstance(layer, SparseStaticLayer)]
        counts = [layer.read_counts() for layer in layers]
        kept, visible = (sum(of_layer) for of_layer in zip((0, 0), *counts, strict=True))
        if visible:
            return kept / visible
        return 1.0 if any(layer.is_read_whole for layer in layers) else None

    @property
    def reason(self) -> str | None:
        """Why layers are read whole, in a sentence that names the rule and its number.

        ``None`` where a part of every layer is read that has no sliding window, and before a token
        is generated. It tells of the last token, where `density` is over all of them, and waits for
        a GPU as that does.
        """
        layers = [layer for layer in self.layers if isinstance(layer, SparseStaticLayer)]
        if not layers:
            return "every layer has a sliding window, which is read whole"
        reasons = Counter(found for layer in layers if (found := layer.reason) is not None)
        if not reasons:
            return None
        of_all = f"{reasons.total()} of {counted(len(layers), 'layer')} read whole"
        return f"{of_all}: {reasons.most_common(1)[0][0]}"


class SparseStaticLayer(StaticLayer):
    """One layer of a `SparseStaticCache`.

    On a CPU its decisions are Python's: compiled code is interrupted for them. On a GPU a
    `DeviceReader` takes them.

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
        self._followed = self._read_whole = self._seen = 0
        self._density = FIRST_DENSITY
        self._units: list[UnitSummaries] = []
        self._awaits_attention = False
        self._reader: DeviceReader | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """See transformers.

        Raises:
            NotImplementedError: Keys are of a kind, or on a device, for which nothing chooses.
        """
        device = key_states.device
        if device.type not in ("cpu", *DEVICES):
            raise NotImplementedError(
                f"SparseStaticCache must be on a CPU or a CUDA device, got {device}; use "
                "transformers' StaticCache"
            )
        obstacle = self._obstacle(key_states, value_states)
        if obstacle is not None:
            raise NotImplementedError(
                "SparseStaticCache must hold keys and values that the kernels on a GPU take, got "
                f"{key_states.dtype} with head_dim {key_states.shape[3]} on {device}: {obstacle}; "
                "use transformers' StaticCache"
            )
        super().lazy_initialization(key_states, value_states)
        if device.type in DEVICES:
            self._reader = DeviceReader(self.keys, self.values, self.selector)
            setattr(self.keys, DECODE_LAYER, self)
        else:
            self._summarize()

    @staticmethod
    def _obstacle(keys: Tensor, values: Tensor) -> str | None:
        """Why no kernel on a GPU takes them; ``None`` where all do, and on a CPU."""
        if keys.device.type != "cuda":
            return None
        found = kernels.keys_obstacle(keys)
        if found is None and not flex_supports(keys, values):
            return "FlexAttention takes a head_dim of 16 and more"
        return found

    @property
    def is_read_whole(self) -> bool:
        """Whether it is on a GPU and too small to be read in part."""
        return self._reader is not None and not self._reader.reads_part

    @property
    def reason(self) -> str | None:
        """Why it is read whole; ``None`` where a part is, and before a token is generated."""
        if self._reader is not None and not self._reader.reads_part:
            return self._reader.reason
        if not self.read_counts()[1]:
            return None
        fewest = self.selector.min_keys
        held = self.length if self._reader is None else int(self.cumulative_length)
        if held <= fewest:
            return f"{held} keys each, and of min_keys={fewest} or fewer all are read"
        if self._reader is not None or self.pays:
            return None
        copied = COPY * self._density
        if copied < 1:
            least = CHOICE_BYTES / (1 - copied)
            return (
                f"{self._size / 1e6:.1f} MB of keys and values each, and on a CPU reading "
                f"{say_share(self._density)} of them is faster from {least / 1e6:.1f} MB on"
            )
        return (
            f"{say_share(self._density)} of the keys were chosen, and on a CPU reading a part is "
            f"faster below {1 / COPY:.0%} at best"
        )

    def read_counts(self) -> tuple[int, int]:
        """Units that were read, of all heads and generated tokens, and units that there were."""
        if self._reader is None:
            return self.kept, self.visible
        kept, visible = self._reader.counter.tolist()
        return kept, visible

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes keys and values; on a CPU they are summarized when a choice asks for it.

        Raises:
            RuntimeError: The last token's attention did not come here.
            ValueError: There is no room for them; a graph does not ask.
        """
        if key_states.device.type not in DEVICES:
            return self._update_now(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._reader is not None
        if not torch.compiler.is_compiling():
            self._expect_room(key_states.shape[2])
        self._expect_attention(key_states.shape[2])
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        self._reader.follow(self.keys, self.cumulative_length, key_states.shape[2])
        return found

    @torch.compiler.disable
    def _update_now(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """`update` on a CPU."""
        count = key_states.shape[2]
        self._expect_room(count)
        self._expect_attention(count)
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        self.length += count
        return found

    def _expect_room(self, rows: int) -> None:
        """Raises where rows go beyond what it holds, as far as calls outside of graphs tell."""
        needed = self._seen + rows
        if needed > self.max_cache_len:
            after = f" after the {self._seen} before" if self._seen else ""
            raise ValueError(
                f"max_cache_len must be at least {needed} for {counted(rows, 'token')}{after}, got "
                f"{self.max_cache_len} (in whole units); give SparseStaticCache the tokens of the "
                "prompt and of the whole answer together"
            )
        self._seen = needed

    def _expect_attention(self, rows: int) -> None:
        """Raises unless `attend` was called since the last row; expects it for one more."""
        if self._awaits_attention:
            name = getattr(self._model_config.get_text_config(), "_attn_implementation", None)
            if name in registered_names:
                raise RuntimeError(
                    "SparseStaticCache must be made of the config of the model that it is given "
                    f"to, got one with attn_implementation={name!r}, whose attention does not run "
                    "in this model; write SparseStaticCache(model.config, ...)"
                )
            raise RuntimeError(
                "SparseStaticCache must be read by the attention of register(), which this "
                f"model does not use: it has attn_implementation={name!r}; call "
                "model.set_attn_implementation('unisparse')"
            )
        self._awaits_attention = rows == 1

    def reset(self) -> None:
        """See transformers."""
        super().reset()
        self.length = self._followed = self._read_whole = self._seen = 0
        self._density = FIRST_DENSITY
        self._awaits_attention = False
        if self._reader is not None:
            self._reader.reset()
        elif self.is_initialized:
            self._summarize()

    def crop(self, tokens: int) -> None:
        """Assisted generation asks for it, which transformers refuses for its own static caches.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"SparseStaticCache must keep the tokens that it was given, got {tokens} to take back; "
            "generate without assistant_model and prompt_lookup_num_tokens, or use a DynamicCache"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See transformers."""
        if self._reader is not None:
            # In place: graphs know where they are.
            at = beam_idx.to(self.keys.device)
            for tensor in (self.keys, self.values):
                tensor.copy_(tensor.index_select(0, at))
            self._reader.reorder(at)
            return
        pinned = [self._units[int(b)].pinned for b in beam_idx]
        super().reorder_cache(beam_idx)
        self._summarize()
        for units, stay in zip(self._units, pinned, strict=True):
            units.pinned.copy_(stay)

    @property
    def pays(self) -> bool:
        """Whether reading a part, as much as it was lately, is faster than reading everything."""
        return CHOICE_BYTES + COPY * self._density * self._size < self._size

    @property
    def _size(self) -> int:
        """Bytes of the keys and values that were written."""
        return self.length * (self.keys[:, :, 0].nbytes + self.values[:, :, 0].nbytes)

    def observe(self, query: Tensor, attention_mask: Tensor | None, scale: float) -> None:
        """Pins the units that the last rows of a prompt look at.

        Args:
            query: [B, Hq, Sq, D], rows that end at the last key.
            attention_mask: Of the whole cache, [B or 1, 1, Sq, S].
            scale: Factor on the logits.

        Raises:
            ValueError: On a GPU: the mask hides a key of the prompt.
        """
        if self._reader is None:
            self._observe_now(query, scale)
        else:
            self._reader.observe(query, self.keys, attention_mask, scale)

    @torch.compiler.disable
    def _observe_now(self, query: Tensor, scale: float) -> None:
        """`observe` on a CPU."""
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

    def written(self, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and the mask of a row that reads everything.

        Args:
            attention_mask: Of the whole cache, as `attend` takes it.

        Returns:
            On a CPU what was written, [B, Hkv, length, D] each, and no mask: it hid the rest.
        """
        if self._reader is not None:
            return self.keys, self.values, attention_mask
        return *self._written_now(), None

    @torch.compiler.disable
    def _written_now(self) -> tuple[Tensor, Tensor]:
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def attend(self, query: Tensor, attention_mask: Tensor | None, scale: float) -> Tensor | None:
        """Attention of one row to the keys that are chosen for it.

        Args:
            query: [B, Hq, 1, D].
            attention_mask: Of the whole cache, [B or 1, 1, 1, S]; hides what is not written alone.
            scale: Factor on the logits.

        Returns:
            [B, Hq, 1, D]; ``None`` where everything that was `written` is to be read.

        Raises:
            ValueError: The mask hides a key of a prompt; on a GPU: it is a bias, or differs from
                head to head.
        """
        self._awaits_attention = False
        if self._reader is None:
            return self._attend_now(query, attention_mask, scale)
        return self._reader.attend(query, self.keys, self.values, attention_mask, scale)

    @torch.compiler.disable
    def _attend_now(
        self, query: Tensor, attention_mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """`attend` on a CPU."""
        if attention_mask is not None:
            own = attention_mask[..., : self.length]
            if not bool(own.all() if own.dtype == torch.bool else (own == 0).all()):
                raise padding_error()
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
