"""Left padding taken out of the block grid: a padded prompt selects what it selects alone.

Blocks are counted from the first token of a batch, which in a left-padded row is padding. A block
that holds only the prompt's first token makes that token's composite key all sink, and the row
keeps other blocks than the same prompt alone. So each row of the batch is turned until its first
key that is no padding begins a block of the row alone, and its output is turned back.

Symbols: B batch, Hq/Hkv heads, S tokens, Sq/Skv those of queries and keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...block_masks.kernels import runs_mask_kernels, turn_keys
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
    Same,
    Truth,
    all_of,
    atoms,
    conjuncts,
    coordinates,
    format_mask,
    is_known,
    mask_4d,
    replace_atoms,
    token_values,
    variable,
    visible_tokens,
)
from ..calls import SdpaCall, SparseConfig
from .sparse_attention import apply_autocast, call_geometry, keeps_window, logit_scale

# Tensors of a turned mask of which nothing but valid keys is read: these, and its rows.
OF_KEYS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignedCall(SdpaCall):
    """A call whose rows are turned: token ``i`` of row ``b`` was ``(i + shift[b]) % S``.

    Of queries S is Sq, of keys Skv.

    Attributes:
        shift: int64 [B], below the block size.
    """

    shift: Any

    def restore(self, output: Tensor) -> Tensor:
        """The output [B, Hq, S, Dv] in the order of tokens that the caller knows."""
        return _turned(output, -self.shift)


def align(
    call: SdpaCall, config: SparseConfig, *, traced: bool, prepared: Sequence[Tensor] = ()
) -> AlignedCall | None:
    """The call with its padding outside of the block grid.

    Args:
        call: A call that `decision.refuse` let through.
        config: Its settings.
        traced: Whether it is recorded into a graph, where nothing can be asked of its mask.
        prepared: What `prepare_mask` made of its mask, where it did.

    Returns:
        ``None`` where nothing may be padded on the left, or nothing is: no mask that hides keys
        from all rows, one that differs from head to head, rows that do not begin the sequence (a
        chunk), rows that see what comes after them, a window that keeps all its blocks.
    """
    with torch.no_grad():
        found = _find_shift(call, config)
        if found is None or not (traced or found[0].device.type != "cpu" or found[0].any()):
            return None
        shift, changed = found[0], _turn_mask(call, *found)
    if prepared:
        # What was just computed again is then read by nothing, and no part of the graph.
        shift, *tensors = prepared
        if call.attn_mask is None:
            changed["mask_tensors"] = tensors
        else:
            changed["attn_mask"] = tensors[0]
    shift = shift.expand(call.query.shape[0])
    for name in ("query", "key", "value"):
        changed[name] = _turned(getattr(call, name), shift)
    arguments = {field.name: getattr(call, field.name) for field in fields(SdpaCall)}
    return AlignedCall(**arguments | changed, shift=shift)


def _find_shift(call: SdpaCall, config: SparseConfig) -> tuple[Tensor, Tensor | None] | None:
    """How far rows are turned, int64 [1 or B], and the valid keys of a formula, bool [B, Skv]."""
    block_size = config.selector.block_size
    if call.attn_mask is not None:
        shift = _shift_of_pairs(mask_4d(call.attn_mask), call.query.shape[2], block_size)
        return None if shift is None else (shift, None)
    valid = _valid_keys(call, config)
    return None if valid is None else (valid.int().argmax(-1) % block_size, valid)


def _turn_mask(call: SdpaCall, shift: Tensor, valid: Tensor | None) -> dict[str, Any]:
    """What becomes of the mask of a call, by what `_find_shift` found: fields of a call."""
    if valid is None:
        return {"attn_mask": _turn_pairs(mask_4d(call.attn_mask), shift)}
    turned = _turn_formula(call.mask_program(), valid, shift)
    return {"mask": format_mask(turned.expr), "mask_tensors": turned.tensors}


def prepared_mask(*args: Any, config: str = "", **kwargs: Any) -> list[Tensor]:
    """`prepare_mask` as a graph calls it, with the arguments of the marker operator."""
    return prepare_mask(SdpaCall.bind(args, kwargs).with_constants(), SparseConfig.decode(config))


def prepare_mask(call: SdpaCall, settings: SparseConfig) -> list[Tensor]:
    """What is made once of the mask of several calls, of which this is one.

    Of a call that is aligned the shift and the tensors of its turned mask, and behind them, or
    alone, what the selector prepares.
    """
    call = apply_autocast(call)
    made: list[Tensor] = []
    with torch.no_grad():
        turned = _turn_on_gpu(call, settings)
        found = None
        if turned is not None:
            call, made = turned
        else:
            found = _find_shift(call, settings)
        if found is not None:
            call = replace(call, **_turn_mask(call, *found))
            of_mask = (call.mask_tensors or ()) if call.attn_mask is None else (call.attn_mask,)
            made = [found[0], *of_mask]
        if call.attn_mask is not None:
            return made
        return made + settings.selector.prepare_mask(
            call.query,
            call.key,
            geometry=call_geometry(call, settings),
            scale=logit_scale(call),
        )


def _turn_on_gpu(call: SdpaCall, settings: SparseConfig) -> tuple[SdpaCall, list[Tensor]] | None:
    """An eager call whose mask is turned by one kernel, with its shift and the mask's tensors.

    ``None`` where nothing is turned, or by PyTorch: traced, elsewhere than on a GPU, or under a
    mask that reads more than which keys are valid.
    """
    tensors, query = call.mask_tensors or (), call.query
    if not call.mask or {type(t) for t in (query, *tensors)} != {Tensor}:
        return None
    if not runs_mask_kernels(query):
        return None
    program = call.mask_program()
    assert program is not None
    offset = call.causal_offset()
    offset = program.split_causal()[0] if offset is None else offset
    if offset != 0 or program.q_len > program.kv_len:
        return None
    places = program.q_len, program.kv_len, program.batch
    plan = _plan_turn(Same(program.expr), len(tensors), *places)
    if plan is None or keeps_window(call_geometry(call, settings)):
        return None
    valid = tensors[plan.number]
    valid = valid if valid.dim() == 2 else valid[None]
    if valid.dtype is not torch.bool or valid.shape != plan.shape:
        return None
    made = turn_keys(
        valid,
        batch=program.batch,
        q_len=program.q_len,
        kv_len=program.kv_len,
        block_size=settings.selector.block_size,
    )
    return replace(call, mask=plan.text, mask_tensors=made[1:], mask_numbers=None), made


@dataclass(frozen=True, slots=True)
class _TurnPlan:
    """A mask that is turned by its valid keys alone.

    Attributes:
        number: Which of its tensors says them.
        shape: Of that.
        text: The formula of the turned mask, of its valid keys and its rows.
    """

    number: int
    shape: tuple[int, int]
    text: str


@lru_cache(maxsize=256)
def _plan_turn(
    formula: Same, tensors: int, q_len: int, kv_len: int, batch: int
) -> _TurnPlan | None:
    """How a formula is turned; ``None`` where that takes more than its valid keys."""
    of_keys = _parts_of_keys(formula)
    if len(of_keys) != 1 or not isinstance(of_keys[0], Truth):
        return None
    load = of_keys[0].load
    if load.index not in ((variable(KV),), (variable(B), variable(KV))):
        return None
    shape = (batch if len(load.index) == 2 else 1), kv_len
    named = [torch.empty((batch, max(q_len, kv_len)), dtype=torch.bool, device="meta")] * tensors
    program = MaskProgram(
        expr=formula.expr, tensors=tuple(named), batch=batch, q_len=q_len, kv_len=kv_len
    )
    others = [part for part in conjuncts(formula.expr) if part not in of_keys]
    if any(isinstance(atom, Load) for part in others for atom in atoms(part)):
        return None
    valid = torch.empty((batch, kv_len), dtype=torch.bool, device="meta")
    shift = torch.empty(batch, dtype=torch.int64, device="meta")
    turned = _turn_formula(program, valid, shift)
    if len(turned.named) != OF_KEYS:
        return None
    return _TurnPlan(int(load.source[1:]), shape, turned.text)


def _is_of_keys(part: Bool) -> bool:
    """Whether a part of a mask hides keys that a tensor names, whatever row asks."""
    loads = any(isinstance(atom, Load) for atom in atoms(part))
    return loads and "kv" in coordinates(part) and "q" not in coordinates(part)


@lru_cache(maxsize=256)
def _parts_of_keys(formula: Same) -> tuple[Bool, ...]:
    """Those of its parts that hide keys from all rows."""
    return tuple(part for part in conjuncts(formula.expr) if _is_of_keys(part))


def _valid_keys(call: SdpaCall, config: SparseConfig) -> Tensor | None:
    """Keys that such parts of a proved mask do not hide, where it may pad: bool [B, Skv]."""
    program = call.mask_program()
    if program is None:
        return None
    of_keys = _parts_of_keys(Same(program.expr))
    if not of_keys:
        return None
    offset = call.causal_offset()
    offset = program.split_causal()[0] if offset is None else offset
    if offset is None or not is_known(offset == 0) or not is_known(program.q_len <= program.kv_len):
        return None
    if keeps_window(call_geometry(call, config)):
        return None
    valid, _ = token_values(program, all_of(of_keys), call.query.device)
    return valid.expand(program.batch, program.kv_len)


def _shift_of_pairs(mask: Tensor, length: int, block_size: int) -> Tensor | None:
    """How far to turn the rows of a call with a mask tensor: int64 [1 or B].

    Not at all where a row sees a key after it: then rows of padding may see something too. Where
    there are more keys than rows, whether these begin the sequence is known only when it runs.
    """
    same_for_rows = is_known(mask.stride(2) == 0)
    if not (is_known(mask.shape[2] == length) and is_known(mask.shape[3] == length)):
        return None
    if same_for_rows or not is_known(mask.shape[1] == 1):
        # Rows of padding see what all rows see; biases of heads are no padding.
        return None
    position = torch.arange(length, device=mask.device)
    seen = visible_tokens(mask)[:, 0]
    is_causal = ~(seen & (position > position[:, None])).flatten(1).any(-1)
    return seen.any(1).int().argmax(-1) % block_size * is_causal


def _turn_pairs(mask: Tensor, shift: Tensor) -> Tensor:
    """A mask [1 or B, 1 or Hq, S, S] whose rows and keys are turned."""
    source = _source(mask.shape[2], shift)
    batch = torch.arange(mask.shape[0], device=mask.device)[:, None, None, None]
    head = torch.arange(mask.shape[1], device=mask.device)[:, None, None]
    return mask[batch, head, source[:, None, :, None], source[:, None, None, :]]


def _turn_formula(program: MaskProgram | None, valid: Tensor, shift: Tensor) -> MaskProgram:
    """The mask of the turned call, of whose keys ``valid`` are.

    Causality leaves the rows before the first valid key without keys, so that what turns to the
    end is seen by nobody and sees nothing.
    """
    assert program is not None
    device = shift.device
    row, key = (torch.arange(size, device=device) for size in (program.q_len, program.kv_len))
    row_exists = row < program.q_len - shift[:, None]
    key_exists = key < program.kv_len - shift[:, None]
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
        Truth(entry(_turn_tokens(valid, shift) & key_exists, B, KV)),
        Truth(entry(row_exists, B, Q)),
    ]
    rest = (part for part in conjuncts(program.expr) if not _is_of_keys(part))
    parts += [replace_atoms(part, turned) for part in rest]
    result = replace(program, expr=all_of(parts), tensors=tuple(tensors))
    # What follows the tensors that are named is what a selector prepared.
    return replace(result, tensors=(*result.named, *program.prepared))


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
    source = _source(tensor.shape[2], shift)[:, None, :, None]
    return tensor.gather(2, source.expand(tensor.shape))


def _source(length: int, shift: Tensor) -> Tensor:
    """Where turned tokens come from: int64 [1 or B, S]."""
    return (torch.arange(length, device=shift.device) + shift[:, None]) % length


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
