"""A model whose decoding rows read a part of the cache, in plain PyTorch.

Symbols as in `rows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unisparse_flex.block_masks.pages import (
    DecodeSelector,
    keep_units,
    pin_units,
    weigh_units,
)

from .rows import Rows
from .summaries import SUMMARIES

IMPLEMENTATION = "decode"
# Keys of the parts whose shares are held: half of the smallest unit.
PART = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What decoding reads.

    Attributes:
        summary: One of `SUMMARIES`; ``None`` for dense decoding.
        selector: The library's rule, and the unit.
    """

    summary: str | None
    selector: DecodeSelector


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """What the last rows of a prompt looked at.

    Attributes:
        shares: By layer, the attention of every `PART` keys, [rows, Hkv, G, n] in 16 bits.
        length: Keys of the prompt, by layer.
    """

    shares: dict[int, Tensor] = field(default_factory=dict)
    length: dict[int, int] = field(default_factory=dict)

    def see(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Takes the call of a layer down."""
        rows = Rows.of_sequence(query, key, value, page=PART, scale=scale)
        shares = rows.logits.softmax(-1).unflatten(-1, (-1, PART)).sum(-1)
        self.shares[layer], self.length[layer] = shares.half(), key.shape[2]

    def pinned(self, layer: int, selector: DecodeSelector, units: int) -> Tensor:
        """Which of so many units stay: bool [Hkv, units]."""
        per_half = selector.unit // PART // 2
        shares = self.shares[layer].float()
        shares = F.pad(shares, (0, 2 * units * per_half - shares.shape[-1]))
        weights = weigh_units(shares.unflatten(-1, (-1, per_half)).sum(-1))
        return pin_units(weights, self.length[layer], selector)


@dataclass(kw_only=True)
class Decoder:
    """Attention of decoding rows, and what it kept of the calls so far.

    Attributes:
        setting: What they read.
        observed: What the ends of the prompts looked at, of each sequence.
        shares: The share of the keys that was kept, of each call.
        recalls: The share of the attention that kept keys hold.
    """

    setting: Setting
    observed: Sequence[Observed] = ()
    shares: list[Tensor] = field(default_factory=list)
    recalls: list[Tensor] = field(default_factory=list)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor | None,
        scale: float,
        layer: int = 0,
    ) -> Tensor:
        """Output [B, S, Hq, D].

        Args:
            query: [B, Hq, S, D], the last rows; one of each where B > 1.
            key: [B, Hkv, Sk, D], those of the rows among them.
            value: [B, Hkv, Sk, D].
            starts: int64 [B], the first key of each sequence; ``None`` for 0.
            scale: Factor on the logits.
            layer: Its index.
        """
        options: dict[str, Any] = {"page": self.setting.selector.unit, "scale": scale}
        if len(query) == 1 and starts is None:
            rows = Rows.of_sequence(query, key, value, **options)
        else:
            starts = key.new_zeros(len(key), dtype=torch.int64) if starts is None else starts
            rows = Rows.of_batch(query, key, value, starts, **options)
        summary, selector = SUMMARIES[self.setting.summary or ""], self.setting.selector
        masses, pinned = summary.estimate(rows), None
        if summary.pins and selector.prompt_share and self.observed:
            found = [one.pinned(layer, selector, masses.shape[-1]) for one in self.observed]
            pinned = torch.stack(found)
        kept = keep_units(masses, rows.lengths, selector, pinned)
        self.shares.append(rows.share(kept))
        self.recalls.append(rows.recall(kept))
        output = rows.attend(kept).to(query.dtype)
        return output[None] if len(query) == 1 else output[:, None]

    def row(self) -> dict[str, float]:
        """Means over the calls."""
        kept, recall = (torch.stack(found).mean() for found in (self.shares, self.recalls))
        return {"kept": float(kept), "recall": float(recall)}


_current: list[Decoder | Observed] = []


@contextmanager
def decoding(
    model: Any, setting: Setting, observed: Sequence[Observed] = ()
) -> Iterator[Decoder | None]:
    """Inside, layers without a window read what ``setting`` says; dense ones as ever."""
    if setting.summary is None:
        yield None
        return
    decoder = Decoder(setting=setting, observed=observed)
    with _calling(model, decoder):
        yield decoder


@contextmanager
def observing(model: Any) -> Iterator[Observed]:
    """Inside, calls are dense, and layers without a window say what their rows look at."""
    observed = Observed()
    with _calling(model, observed):
        yield observed


@contextmanager
def _calling(model: Any, asked: Decoder | Observed) -> Iterator[None]:
    _register()
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    _current.append(asked)
    try:
        yield
    finally:
        _current.pop()
        model.set_attn_implementation(before)


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)
    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, masks)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    asked, layer = _current[-1], module.layer_idx
    has_window = getattr(module, "sliding_window", None) is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if has_window or isinstance(asked, Observed):
        if isinstance(asked, Observed) and not has_window:
            asked.see(layer, query, key, value, scale)
        found = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
        return found[0], None
    starts = None
    if attention_mask is not None and len(query) > 1:
        starts = attention_mask[:, 0, -1].int().argmax(-1)
    return asked.attend(query, key, value, starts, scale, layer), None
