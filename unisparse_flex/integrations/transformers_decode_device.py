"""How a layer of a static cache is read on a GPU: nothing waits for it, graphs may hold all of it.

Symbols: B batch, Hq/Hkv heads, S keys of the cache, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..block_masks.pages import (
    PROMPT_ROWS,
    DecodeSelector,
    UnitSummaries,
    choose_rows,
    pin_rows,
    summarize_rows,
)
from ..passes.attend import attend_listed
from .deferred_mask import DeferredMask

# A layer of no more bytes of keys and values, for the whole batch, is read whole: choosing takes
# three launches.
FEW_BYTES = 32 * 2**20


class DeviceReader:
    """Which keys of a layer a generated token reads, decided on its device.

    Whether a part is read is decided once, by the size of the cache: graphs hold for every length.

    Args:
        keys: [B, Hkv, S, D], those of the cache; S is a multiple of the selector's unit.
        values: [B, Hkv, S, Dv].
        selector: Which keys are read.

    Attributes:
        reads_part: Whether keys are left out.
        counter: int64 [2], units that were read and units that there were, of all heads and
            generated tokens.
    """

    def __init__(self, keys: Tensor, values: Tensor, selector: DecodeSelector) -> None:
        batch, device = keys.shape[0], keys.device
        self._pins, self._text = selector.prompt_share > 0, selector.text
        self._bytes, self._room = keys.nbytes + values.nbytes, keys.shape[2]
        self._min_keys = selector.min_keys
        self.reads_part = self._bytes > FEW_BYTES and self._room > self._min_keys
        self.counter = torch.zeros(2, dtype=torch.int64, device=device)
        if not self.reads_part:
            return
        # Each sequence is a page.
        self._units = UnitSummaries.create(keys, selector.unit)
        self._lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._order = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
        if not torch.compiler.is_compiling():
            units = self._units
            held = units.numbers, units.scales, units.pinned
            for tensor in (self._lengths, self._order, self.counter, *held):
                # CUDA graphs neither copy it nor stop at its changes.
                torch._dynamo.mark_static_address(tensor)

    @property
    def reason(self) -> str | None:
        """Why no keys are left out; ``None`` where some are."""
        if self.reads_part:
            return None
        if self._room <= self._min_keys:
            return (
                f"room for {self._room} keys each, and of min_keys={self._min_keys} or fewer all "
                "are read"
            )
        return (
            f"{self._bytes / 2**20:.1f} MiB of keys and values each, and on a GPU those of "
            f"{FEW_BYTES / 2**20:.0f} MiB or less are read whole"
        )

    def follow(self, keys: Tensor, length: Tensor, rows: int) -> None:
        """Takes note of rows that were written.

        Args:
            keys: [B, Hkv, S, D] with the rows.
            length: int64, one number: keys that there are.
            rows: How many are new.
        """
        if self.reads_part:
            summarize_rows(keys, self._units, self._lengths, length, rows)

    def observe(self, query: Tensor, keys: Tensor, mask: Tensor | None, scale: float) -> None:
        """Pins the units that the last rows of a prompt look at.

        Args:
            query: [B, Hq, Sq, D], rows that end at the last key.
            keys: [B, Hkv, S, D].
            mask: Of the whole cache, [B or 1, 1, Sq, S].
            scale: Factor on the logits.

        Raises:
            ValueError: The mask hides a key of the prompt; a graph does not ask.
        """
        if not self.reads_part:
            return
        if not torch.compiler.is_compiling() and _hides(mask, self._lengths):
            raise padding_error()
        if self._pins:
            rows = query[:, :, -PROMPT_ROWS:].transpose(1, 2)
            pin_rows(rows, keys, self._units, self._lengths, selector=self._text, scale=scale)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """Attention of one row to the keys that are chosen for it.

        Args:
            query: [B, Hq, 1, D].
            keys: [B, Hkv, S, D].
            values: [B, Hkv, S, Dv].
            mask: Of the whole cache, bool [B or 1, 1, 1, S]. What it hides is not read.
            scale: Factor on the logits.

        Returns:
            [B, Hq, 1, Dv]; ``None`` where everything is to be read.

        Raises:
            ValueError: The mask is a bias, or differs from head to head.
            RuntimeError: A gradient is asked for.
        """
        if not self.reads_part:
            return None
        if torch.is_grad_enabled() and query.requires_grad:
            raise RuntimeError(
                "SparseStaticCache must be read without gradients, got a query that requires one; "
                "call the model under torch.no_grad()"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
            raise ValueError(
                "attention_mask must be bool [batch, 1, 1, keys] for SparseStaticCache, got "
                f"{mask.dtype} {list(mask.shape)}; use transformers' StaticCache"
            )
        row = query[:, :, 0]
        counts, units = choose_rows(
            row,
            self._units,
            self._order,
            self._lengths,
            self.counter,
            selector=self._text,
            scale=scale,
        )
        found = attend_listed(
            row,
            keys,
            values,
            counts,
            units,
            self._lengths,
            None if mask is None else mask[:, 0, 0],
            unit=self._units.unit,
            scale=scale,
        )
        return found[:, :, None]

    def reset(self) -> None:
        """Forgets the keys."""
        if self.reads_part:
            self._lengths.zero_()
            self._units.pinned.zero_()

    def reorder(self, beam_idx: Tensor) -> None:
        """What was kept of sequences is that of others from now on."""
        if self.reads_part:
            for tensor in (self._units.numbers, self._units.scales, self._units.pinned):
                tensor.copy_(tensor.index_select(0, beam_idx))


def padding_error() -> ValueError:
    """Of a prompt with padding."""
    return ValueError(
        "SparseStaticCache must have prompts without padding, got a mask that hides keys; generate "
        "for prompts of one length at a time"
    )


def _hides(mask: Tensor | None, lengths: Tensor) -> bool:
    """Whether the last row of a prompt may not see some key up to itself."""
    if isinstance(mask, DeferredMask):
        # Computed it may be larger than the model.
        own = mask.padding
    else:
        own = None if mask is None else mask[:, 0, -1]
    if own is None:
        return False
    seen = own != 0 if own.dtype == torch.bool or isinstance(mask, DeferredMask) else own == 0
    place = torch.arange(own.shape[-1], device=own.device)
    return not bool((seen | (place >= lengths[:, None])).all())
