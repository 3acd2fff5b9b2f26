"""A model whose decoding rows read a part of the cache, in plain PyTorch.

Symbols as in `rows`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unisparse_flex.block_masks.pages import DecodeSelector, keep_units

from .rows import Rows
from .summaries import SUMMARIES

IMPLEMENTATION = "decode"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What decoding reads.

    Attributes:
        summary: One of `SUMMARIES`; ``None`` for dense decoding.
        selector: The library's rule, and the unit.
    """

    summary: str | None
    selector: DecodeSelector


@dataclass(kw_only=True)
class Decoder:
    """Attention of decoding rows, and what it kept of the calls so far.

    Attributes:
        setting: What they read.
        shares: The share of the keys that was kept, of each call.
        recalls: The share of the attention that kept keys hold.
    """

    setting: Setting
    shares: list[Tensor] = field(default_factory=list)
    recalls: list[Tensor] = field(default_factory=list)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor | None, scale: float
    ) -> Tensor:
        """Output [B, S, Hq, D].

        Args:
            query: [B, Hq, S, D], the last rows; one of each where B > 1.
            key: [B, Hkv, Sk, D], those of the rows among them.
            value: [B, Hkv, Sk, D].
            starts: int64 [B], the first key of each sequence; ``None`` for 0.
            scale: Factor on the logits.
        """
        options: dict[str, Any] = {"page": self.setting.selector.unit, "scale": scale}
        if len(query) == 1 and starts is None:
            rows = Rows.of_sequence(query, key, value, **options)
        else:
            starts = key.new_zeros(len(key), dtype=torch.int64) if starts is None else starts
            rows = Rows.of_batch(query, key, value, starts, **options)
        masses = SUMMARIES[self.setting.summary or ""].estimate(rows)
        kept = keep_units(masses, rows.lengths, self.setting.selector)
        self.shares.append(rows.share(kept))
        self.recalls.append(rows.recall(kept))
        found = rows.attend(kept).to(query.dtype)
        return found[None] if len(query) == 1 else found[:, None]

    def row(self) -> dict[str, float]:
        """Means over the calls."""
        kept, recall = (torch.stack(found).mean() for found in (self.shares, self.recalls))
        return {"kept": float(kept), "recall": float(recall)}


_current: list[Decoder] = []


@contextmanager
def decoding(model: Any, setting: Setting) -> Iterator[Decoder | None]:
    """Inside, layers without a window read what ``setting`` says; dense ones as ever."""
    if setting.summary is None:
        yield None
        return
    _register()
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    _current.append(Decoder(setting=setting))
    try:
        yield _current[-1]
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

    if getattr(module, "sliding_window", None) is not None:
        found = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )
        return found[0], None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    starts = None
    if attention_mask is not None and len(query) > 1:
        starts = attention_mask[:, 0, -1].int().argmax(-1)
    return _current[-1].attend(query, key, value, starts, scale), None
