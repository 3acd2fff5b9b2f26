"""Decoding where the keys of a sequence lie one after the other, as operators that graphs hold.

Nothing of it waits for the device. Lengths are a tensor, and what is chosen is written as the block
lists of FlexAttention: each unit is a block of keys.

Symbols: B sequences, Hq/Hkv heads, S places for keys, U keys of a unit, n units, D head_dim.
"""

from __future__ import annotations

import ast
from functools import lru_cache

import torch
from torch import Tensor

from .. import kernels
from .decode import DecodeSelector, choose_units
from .pinned import pin_units, weigh_rows
from .summaries import UnitSummaries
from .tables import PageTables

_library = torch.library.Library("unisparse", "FRAGMENT")
_library.define(
    "summarize_rows(Tensor keys, Tensor length, SymInt rows, int unit, Tensor(a!) lengths, "
    "Tensor(b!) numbers, Tensor(c!) scales) -> ()"
)
_library.define(
    "choose_rows(Tensor query, Tensor numbers, Tensor scales, Tensor pinned, Tensor order, "
    "Tensor lengths, Tensor(a!) counter, str selector, float scale) -> (Tensor, Tensor)"
)
_library.define(
    "pin_rows(Tensor query, Tensor keys, Tensor lengths, Tensor(a!) pinned, str selector, "
    "float scale) -> ()"
)


def summarize_rows(
    keys: Tensor, units: UnitSummaries, lengths: Tensor, length: Tensor, rows: int
) -> None:
    """Brings lengths and summaries up to date with rows just written.

    Args:
        keys: [B, Hkv, S, D] with the rows.
        units: Of these keys: each sequence is a page of S keys.
        lengths: int32 [B], which becomes ``length``.
        length: Keys of each sequence, the rows included; one integer.
        rows: How many were written at the end of each.
    """
    torch.ops.unisparse.summarize_rows(
        keys, length, rows, units.unit, lengths, units.numbers, units.scales
    )


def pin_rows(
    query: Tensor,
    keys: Tensor,
    units: UnitSummaries,
    lengths: Tensor,
    *,
    selector: str,
    scale: float,
) -> None:
    """Pins the units that the last rows of prompts look at, as `pin_prompt` finds them.

    Of a prompt that is read whole none, and what was pinned before no longer.

    Args:
        query: [B, R, Hq, D], rows that end at the last key.
        keys: [B, Hkv, S, D]; what lies after ``lengths`` counts for nothing, but must be finite.
        units: Of these keys: each sequence is a page of S keys.
        lengths: int32 [B], keys of each sequence, R at least.
        selector: A selector's `DecodeSelector.text`, with the unit of the summaries.
        scale: Factor on the logits.
    """
    torch.ops.unisparse.pin_rows(query, keys, lengths, units.pinned, selector, scale)


def choose_rows(
    query: Tensor,
    units: UnitSummaries,
    order: Tensor,
    lengths: Tensor,
    counter: Tensor,
    *,
    selector: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The units that decoding queries read, in order.

    Args:
        query: [B, Hq, D], one row of each sequence.
        units: Of the keys: each sequence is a page of S keys. Up to date with the rows.
        order: int32 [B, 1], the sequences: 0, 1, ...
        lengths: int32 [B], keys of each.
        counter: int64 [2], to which kept and visible units are added.
        selector: A selector's `DecodeSelector.text`, with the unit of the summaries.
        scale: Factor on the logits.

    Returns:
        int32 [B, Hkv], the keys that are read, and int32 [B, Hkv, n], the units in which they lie;
        what follows these says nothing. The last unit is read as far as it is filled.
    """
    held = units.numbers, units.scales, units.pinned
    found: tuple[Tensor, Tensor] = torch.ops.unisparse.choose_rows(
        query, *held, order, lengths, counter, selector, scale
    )
    return found


def _summarize(
    keys: Tensor,
    length: Tensor,
    rows: int,
    unit: int,
    lengths: Tensor,
    numbers: Tensor,
    scales: Tensor,
) -> None:
    lengths.copy_(length)
    if keys.device.type == "cuda":
        kernels.summarize_rows(keys, lengths, numbers, scales, rows=rows, unit=unit)
        return
    pinned = numbers.new_empty(numbers.shape[:3], dtype=torch.uint8)
    units = UnitSummaries(unit=unit, numbers=numbers, scales=scales, pinned=pinned)
    place = torch.arange(unit)
    for sequence, held in enumerate(lengths.tolist()):
        part = torch.arange(max(held - rows, 0) // unit, -(-held // unit))
        own = keys[sequence].unflatten(1, (-1, unit)).transpose(0, 1)[part]
        exists = place < (held - part * unit)[:, None]
        units.write(own, torch.full_like(part, sequence), part, exists[:, None, :, None])


def _pin(
    query: Tensor, keys: Tensor, lengths: Tensor, pinned: Tensor, selector: str, scale: float
) -> None:
    how = read_selector(selector)
    for rows, key, length, out in zip(query, keys, lengths, pinned, strict=True):
        first = length - rows.shape[0]
        position = torch.arange(key.shape[1], device=key.device)
        last_seen = first + torch.arange(rows.shape[0], device=key.device)
        hidden = position > last_seen[:, None, None]
        weights = weigh_rows(rows, key, hidden, selector=how, scale=scale)
        out.copy_(pin_units(weights, length, how) & (length > how.min_keys))


def _describe_nothing(*_: object) -> None:
    pass


def _choose(
    query: Tensor,
    numbers: Tensor,
    scales: Tensor,
    pinned: Tensor,
    order: Tensor,
    lengths: Tensor,
    counter: Tensor,
    selector: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, count = pinned.shape
    how = read_selector(selector)
    out = PageTables.create(batch * heads, count, counter)
    if query.device.type != "cuda":
        # Plain PyTorch may look at all of it.
        out.tables.zero_()
    choose_units(
        # Kernels read the numbers of a row side by side.
        query if query.stride(-1) == 1 else query.contiguous(),
        UnitSummaries(unit=how.unit, numbers=numbers, scales=scales, pinned=pinned),
        order,
        lengths,
        out,
        selector=how,
        scale=scale,
        steps=(0, 0, 1),
    )
    return out.lengths.view(batch, heads), out.tables.view(batch, heads, count)


@lru_cache(maxsize=256)
def read_selector(text: str) -> DecodeSelector:
    """The selector whose `DecodeSelector.text` this is."""
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    return DecodeSelector(**{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})


def _describe_choice(
    query: Tensor, numbers: Tensor, scales: Tensor, pinned: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    shape = pinned.shape
    return query.new_empty(shape[:2], dtype=torch.int32), query.new_empty(shape, dtype=torch.int32)


_library.impl("summarize_rows", _summarize, "CompositeExplicitAutograd")
torch.library.register_fake("unisparse::summarize_rows", _describe_nothing, lib=_library)
_library.impl("pin_rows", _pin, "CompositeExplicitAutograd")
torch.library.register_fake("unisparse::pin_rows", _describe_nothing, lib=_library)
_library.impl("choose_rows", _choose, "CompositeExplicitAutograd")
torch.library.register_fake("unisparse::choose_rows", _describe_choice, lib=_library)
