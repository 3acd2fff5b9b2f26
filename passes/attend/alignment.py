"""Left padding taken out of the block grid: a padded prompt selects what it selects alone.

Blocks are counted from the first token of a batch, which in a left-padded row is padding. A block
that holds only the prompt's first token makes that token's composite key all sink, and the row
keeps other blocks than the same prompt alone. So each row of the batch is turned until its first
key that is no padding begins a block of the row alone, and its output is turned back.

Symbols: B batch, Hq/Hkv heads, S tokens, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...block_masks.masks import (
    KV,
    Affine,
    Atom,
    B,
    Bool,
    Coordinate,
    Load,
    MaskProgram,
    Q,
    Truth,
    all_of,
    atoms,
    conjuncts,
    coordinates,
    format_mask,
    is_known,
    replace_atoms,
    token_values,
    variable,
)
from ..calls import SdpaCall, SparseConfig
from .sparse_attention import apply_autocast, call_geometry, keeps_window, logit_scale


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignedCall(SdpaCall):
    """A call whose rows are turned: token ``i`` of row ``b`` was ``(i + shift[b]) % S``.

    Attributes:
        shift: int64 [B], below the block size.
    """

    shift: Any

    def restore(self, output: Tensor) -> Tensor:
        """The output [B, Hq, S, Dv] in the order of tokens that the caller knows."""
        return _turned(output, -self.shift)


def align(call: SdpaCall, config: SparseConfig) -> AlignedCall | None:
    """The call with its padding outside of the block grid.

    Args:
        call: A call that `decision.refuse` let through.
        config: Its settings.

    Returns:
        ``None`` where nothing may be padded on the left: no proved mask that hides keys from all
        rows, rows that are no sequence of their own (a chunk, a cache), a window that keeps all
        its blocks.
    """
    program = call.mask_program()
    if program is None or not is_known(program.q_len == program.kv_len):
        return None
    offset = call.causal_offset()
    offset = program.split_causal()[0] if offset is None else offset
    of_keys = [part for part in conjuncts(program.expr) if _is_of_keys(part)]
    if offset is None or not is_known(offset == 0) or not of_keys:
        return None
    if keeps_window(call_geometry(call, config)):
        return None
    with torch.no_grad():
        turned, shift = _turn_mask(program, all_of(of_keys), config.selector.block_size)
    arguments = {field.name: getattr(call, field.name) for field in fields(SdpaCall)} | {
        "query": _turned(call.query, shift),
        "key": _turned(call.key, shift),
        "value": _turned(call.value, shift),
        "mask": format_mask(turned.expr),
        "mask_tensors": turned.tensors,
    }
    return AlignedCall(**arguments, shift=shift)


def prepared_mask(*args: Any, config: str = "", **kwargs: Any) -> list[Tensor]:
    """What the selector prepares of the mask of a call, whose arguments these are."""
    call, settings = SdpaCall.bind(args, kwargs), SparseConfig.decode(config)
    call = apply_autocast(call.with_constants())
    call = align(call, settings) or call
    with torch.no_grad():
        return settings.selector.prepare_mask(
            call.query,
            call.key,
            geometry=call_geometry(call, settings),
            scale=logit_scale(call),
        )


def _is_of_keys(part: Bool) -> bool:
    """Whether a part of a mask hides keys that a tensor names, whatever row asks."""
    loads = any(isinstance(atom, Load) for atom in atoms(part))
    return loads and "kv" in coordinates(part) and "q" not in coordinates(part)


def _turn_mask(program: MaskProgram, of_keys: Bool, block_size: int) -> tuple[MaskProgram, Tensor]:
    """The mask of the turned call, and how far its rows are turned.

    Causality leaves the rows before the first valid key without keys, so that what turns to the
    end is seen by nobody and sees nothing.
    """
    device = program.tensors[0].device
    valid = token_values(program, of_keys, device)[0].expand(program.batch, program.kv_len)
    shift = valid.int().argmax(-1) % block_size
    position = torch.arange(program.kv_len, device=device)
    before_end = position < program.kv_len - shift[:, None]
    tensors: list[Tensor] = []
    known: dict[Load, Load] = {}

    def entry(tensor: Tensor, *index: Coordinate) -> Load:
        tensors.append(tensor)
        return Load(f"t{len(tensors) - 1}", tuple(variable(name) for name in index))

    def turned(atom: Atom) -> Affine | None:
        if atom in (KV, Q):
            if _SHIFT not in known:
                known[_SHIFT] = entry(shift, B)
            return variable(atom) + variable(known[_SHIFT])
        if not isinstance(atom, Load):
            return None
        if atom not in known:
            values, along = token_values(program, Truth(atom), device)
            values = values.expand(program.batch, -1)
            known[atom] = (
                entry(values[:, 0], B)
                if along is None
                else entry(_turn_tokens(values, shift), B, KV if along == "kv" else Q)
            )
        return variable(known[atom])

    parts: list[Bool] = [
        Truth(entry(_turn_tokens(valid, shift) & before_end, B, KV)),
        Truth(entry(before_end, B, Q)),
    ]
    rest = (part for part in conjuncts(program.expr) if not _is_of_keys(part))
    parts += [replace_atoms(part, turned) for part in rest]
    result = replace(program, expr=all_of(parts), tensors=tuple(tensors))
    # What follows the tensors that are named is what a selector prepared.
    return replace(result, tensors=(*result.named, *program.prepared)), shift


# Stands for the shift among the entries that a mask reads.
_SHIFT = Load("", ())


def _turned(tensor: Tensor, shift: Tensor) -> Tensor:
    """`_turn`, with a gradient where one is needed."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        result: Tensor = _Turned.apply(tensor, shift)
        return result
    return _turn(tensor, shift)


def _turn_tokens(values: Tensor, shift: Tensor) -> Tensor:
    """[B, S] with each row turned to the left by its shift, its last entry in what came round.

    That is seen by nobody. Another document's id would widen the range of ids in its block.
    """
    position = torch.arange(values.shape[1], device=shift.device) + shift[:, None]
    return values.gather(1, position.clamp(max=values.shape[1] - 1))


def _turn(tensor: Tensor, shift: Tensor) -> Tensor:
    """[B, H, S, D] with each batch element's tokens turned to the left by its shift."""
    length = tensor.shape[2]
    source = (torch.arange(length, device=shift.device) + shift[:, None]) % length
    return tensor.gather(2, source[:, None, :, None].expand(tensor.shape))


class _Turned(torch.autograd.Function):
    """`_turn`, whose gradient turns back: every token comes from one other."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(shift)
        return _turn(tensor, shift)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (shift,) = ctx.saved_tensors
        return _turn(grad, -shift), None
