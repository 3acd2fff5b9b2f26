"""What a mask tensor says, read from its entries: most are causality, padding, windows, documents.

Symbols: Bm the mask's batch (1 or B), Sq/Skv tokens, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .tensors import mask_4d, nearest_valid, visible_tokens

# Entries that are looked at in one step.
CHUNK_ENTRIES = 2**28
# Keys whose visible ones are counted together.
TILE = 128


@dataclass(frozen=True, slots=True, eq=False)
class MaskContents:
    """A mask as causality and a formula, see `MaskProgram`; exactly the pairs of the tensor.

    Attributes:
        causal_offset: Row ``r`` sees the keys up to ``r + causal_offset``; ``None`` for no such
            rule.
        text: What else the mask says; empty for nothing. ``n0`` stands for `number`.
        tensors: What ``t0, t1, ...`` stand for.
        number: An integer that differs from one chunk of a prompt to the next.
        in_window: Whether row ``r`` sees no keys up to ``r + number``.
        tables: What each of ``tensors`` is, as `mask_table` names it.
    """

    causal_offset: int | None
    text: str
    tensors: tuple[Tensor, ...]
    number: int = 0
    in_window: bool = False
    tables: tuple[str, ...] = ()


# What `MaskFacts` say beside two integers.
TRUTHS = (
    *("is_plain", "are_runs", "sees_some"),
    *("ends_at_own", "ends_at_highest", "begins_at_lowest", "begins_with_window"),
    *("all_valid", "all_valid_if_causal", "all_valid_in_window"),
    *("shows_too_much", "shows_too_much_if_causal", "shows_too_much_in_window"),
)
# Those that hold if they do for some row; the others must for all.
SOME = tuple(name for name in TRUTHS if name.startswith(("sees", "shows")))


@dataclass(frozen=True, slots=True, eq=False)
class MaskFacts:
    """What was found out of a mask, before it is put into words.

    Attributes:
        batch: Bm, the mask's own.
        q_len: Query rows Sq.
        kv_len: Keys Skv.
        offset: By how many at most a row's last key lies after its number; -Skv of no keys.
        width: Keys of the widest window up to a row's own position, that number and the offset.
        holds: `TRUTHS`: no entry adds to logits; rows see all valid keys between their ends; some
            row sees a key; where these ends lie, if they see any; which keys are valid; whether
            rows that see none would see some.
        last: int64 [Bm, Sq], the last key that a row sees; -1 where it sees none.
        first: int64 [Bm, Sq], the first one; Skv where it sees none.
        sees: bool [Bm, Sq].
        valid: bool [Bm, Skv], keys that some row sees.
        valid_if_causal: Those, and keys after the last row's own.
        valid_in_window: Those, and keys before the first row's window.
    """

    batch: int
    q_len: int
    kv_len: int
    offset: int
    width: int
    holds: dict[str, bool]
    last: Tensor
    first: Tensor
    sees: Tensor
    valid: Tensor
    valid_if_causal: Tensor
    valid_in_window: Tensor


def read_mask(attn_mask: Tensor, *, q_len: int, kv_len: int) -> MaskContents | None:
    """Reads a mask of real entries; waits for the device once.

    Args:
        attn_mask: bool or float, broadcastable to [B, Hq, Sq, Skv].
        q_len: Query rows Sq.
        kv_len: Keys Skv.

    Returns:
        ``None`` for masks that differ from head to head, that add to visible logits, under which
        no row sees a key, or some row sees keys in pieces between which lies a key of other rows.
    """
    mask = pairs_of_mask(attn_mask, kv_len)
    if mask is None:
        return None
    rows = _Rows.of(mask)
    # One row that stands for all says what keys are valid, and nothing of positions.
    spread = rows if mask.shape[1] == q_len else rows.repeated(q_len)
    return describe_facts(_find_facts(spread, q_len, kv_len))


def pairs_of_mask(attn_mask: Tensor, kv_len: int) -> Tensor | None:
    """The pairs of a mask, each once: [1 or B, 1 or Sq, Skv]; ``None`` if heads differ."""
    mask = mask_4d(attn_mask)
    if not is_alike_along(mask, 1):
        return None
    mask = mask[:, 0].expand(-1, -1, kv_len)
    mask = mask[:1] if mask.stride(0) == 0 else mask
    return mask[:, :1] if mask.stride(1) == 0 else mask


def is_alike_along(mask: Tensor, along: int) -> bool:
    """Whether a mask [..., Sq, Skv] is the same at every place of one of its first dimensions.

    Waits for the device unless the dimension is one of size 1, or expanded.
    """
    if mask.shape[along] == 1 or mask.stride(along) == 0:
        return True
    if mask.shape[along] == 0:
        return False
    parts = mask.movedim(along, 0)
    rest = [part for part in range(1, parts.dim() - 2) if parts.stride(part) == 0]
    for part in rest:
        parts = parts.narrow(part, 0, 1)
    # One place after the other: nothing larger than a part is made.
    return bool(torch.stack([(part == parts[0]).all() for part in parts[1:]]).all())


def mask_table(
    seen: Tensor, name: str, *, causal_offset: int | None = None, number: int | None = None
) -> Tensor:
    """One of the tensors of `MaskContents`, from the mask: of a mask that may be traced.

    Args:
        seen: bool [..., Sq, Skv], the pairs.
        name: ``"last"`` or ``"first"``, the last or first key that a row sees, -1 or Skv where it
            sees none; ``"sees"``, rows that see some; ``"valid"``, keys that no row is kept from
            by what hides single keys.
        causal_offset: That of the contents.
        number: Likewise, of a window; ``None`` without one.

    Returns:
        int64 [..., Sq] for the ends of rows, bool [..., Sq] for rows, bool [..., Skv] for keys.
    """
    q_len, kv_len = seen.shape[-2:]
    key = torch.arange(kv_len, device=seen.device)
    match name:
        case "last":
            return torch.where(seen, key, -1).amax(-1)
        case "first":
            return torch.where(seen, key, kv_len).amin(-1)
        case "sees":
            return seen.any(-1)
    valid = seen.any(-2)
    if causal_offset is not None:
        valid = valid | (key > q_len - 1 + causal_offset)
    return valid if number is None else valid | (key <= number)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the rows of a mask [Bm, Sq, Skv] see.

    Attributes:
        first: int64 [Bm, Sq], the first key; any where there is none.
        last: int64 [Bm, Sq], the last key.
        count: int64 [Bm, Sq], how many.
        valid: bool [Bm, Skv], keys that some row sees.
        is_plain: bool [], whether visible entries add nothing.
    """

    first: Tensor
    last: Tensor
    count: Tensor
    valid: Tensor
    is_plain: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> _Rows:
        step = max(1, CHUNK_ENTRIES // max(1, mask.shape[0] * mask.shape[2]))
        ends, count = [], []
        valid = mask.new_zeros((mask.shape[0], mask.shape[2]), dtype=torch.bool)
        is_plain = torch.ones((), dtype=torch.bool, device=mask.device)
        for start in range(0, mask.shape[1], step):
            part = mask[:, start : start + step]
            seen = visible_tokens(part)
            if part.dtype is not torch.bool:
                is_plain &= ((part == 0) | ~seen).all()
            counts = _counts_of_tiles(seen)
            count.append(counts.sum(-1))
            ends.append(_ends(seen, counts))
            valid |= seen.any(1)
        first, last = torch.cat(ends, 1).unbind(-1)
        return cls(first, last, torch.cat(count, 1), valid, is_plain)

    def repeated(self, rows: int) -> _Rows:
        """One row that stands for so many."""
        first, last, count = (x.expand(-1, rows) for x in (self.first, self.last, self.count))
        return replace(self, first=first, last=last, count=count)


def _counts_of_tiles(seen: Tensor) -> Tensor:
    """How many keys rows [Bm, S, Skv] see of each tile: int32 [Bm, S, tiles].

    The one pass over all pairs by row; everything else is looked up in what it finds.
    """
    whole = seen.shape[-1] // TILE * TILE
    counts = seen[..., :whole].unflatten(-1, (-1, TILE)).sum(-1, dtype=torch.int32)
    if whole == seen.shape[-1]:
        return counts
    rest = seen[..., whole:].sum(-1, keepdim=True, dtype=torch.int32)
    return torch.cat([counts, rest], -1)


def _ends(seen: Tensor, counts: Tensor) -> Tensor:
    """The first and the last key that rows see: int64 [Bm, S, 2]; any where there is none."""
    # As integers of a byte: no maximum of bool is at a place.
    some = (counts > 0).view(torch.uint8)
    first = some.argmax(-1)
    last = some.shape[-1] - 1 - some.flip(-1).argmax(-1)
    inside = torch.arange(TILE, device=seen.device)
    most = seen.shape[-1] - 1

    def keys(tile: Tensor) -> Tensor:
        return (tile[..., None] * TILE + inside).clamp(max=most)

    low, high = keys(first), keys(last)
    low = torch.where(seen.gather(-1, low), low, most).amin(-1)
    high = torch.where(seen.gather(-1, high), high, 0).amax(-1)
    return torch.stack([low, high], -1)


def _find_facts(rows: _Rows, q_len: int, kv_len: int) -> MaskFacts:
    """What is true of the rows; waits for the device."""
    device = rows.first.device
    row, key = torch.arange(q_len, device=device), torch.arange(kv_len, device=device)
    sees = rows.count > 0
    # Rows see all valid keys between their first and last one, or see keys in pieces.
    before = F.pad(rows.valid.cumsum(-1), (1, 0))
    between = before.gather(1, rows.last + 1) - before.gather(1, rows.first)
    are_runs = ((between == rows.count) | ~sees).all()
    offset = torch.where(sees, rows.last - row, -kv_len).amax()
    own = row + offset
    # A key that no row of a causal call reaches need not be hidden from them.
    valid = rows.valid | (key > own[-1])
    following, preceding = nearest_valid(rows.valid)
    batch = sees.shape[0]
    lowest, highest = following[:, :1], preceding[:, -1:]
    up_to_own = preceding[:, own.clamp(0, kv_len - 1)].masked_fill(own < 0, -1)
    width = torch.where(sees & (rows.first > lowest), own - rows.first + 1, 1).amax()
    window_begin = following[:, (own - width + 1).clamp(0, kv_len - 1)]
    # Nor one before the window of the first row.
    valid_in_window = valid | (key <= own[0] - width)

    def says(expected: Tensor, found: Tensor) -> Tensor:
        return ((expected == found) | ~sees).all()

    def shows_more(low: Tensor, high: Tensor) -> Tensor:
        """Whether rows that see nothing would see a key between two that are valid."""
        return ((low <= high).expand(batch, q_len) & ~sees).any()

    truths = {
        "is_plain": rows.is_plain,
        "are_runs": are_runs,
        "sees_some": sees.any(),
        "ends_at_own": says(up_to_own, rows.last),
        "ends_at_highest": says(highest, rows.last),
        "begins_at_lowest": says(lowest, rows.first),
        "begins_with_window": says(window_begin, rows.first),
        "all_valid": rows.valid.all(),
        "all_valid_if_causal": valid.all(),
        "all_valid_in_window": valid_in_window.all(),
        "shows_too_much": shows_more(lowest, highest),
        "shows_too_much_if_causal": shows_more(lowest, up_to_own),
        "shows_too_much_in_window": shows_more(window_begin, up_to_own),
    }
    found = torch.stack([offset, width, *(truths[name].to(offset.dtype) for name in TRUTHS)])
    found_offset, found_width, *flags = found.tolist()
    return MaskFacts(
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        offset=found_offset,
        width=found_width,
        holds={name: bool(flag) for name, flag in zip(TRUTHS, flags, strict=True)},
        last=torch.where(sees, rows.last, -1),
        first=torch.where(sees, rows.first, kv_len),
        sees=sees,
        valid=rows.valid,
        valid_if_causal=valid,
        valid_in_window=valid_in_window,
    )


def describe_facts(facts: MaskFacts) -> MaskContents | None:
    """The shortest formula among those that say what the rows see; see `read_mask`."""
    holds = facts.holds
    if not (holds["is_plain"] and holds["are_runs"] and holds["sees_some"]):
        return None
    in_range = facts.offset == 0 or 0 <= facts.offset <= facts.kv_len - facts.q_len
    is_causal = holds["ends_at_own"] and in_range
    in_window = is_causal and holds["begins_with_window"] and not holds["begins_at_lowest"]
    case = "_in_window" if in_window else "_if_causal" if is_causal else ""
    formula = _Formula(facts.batch)
    number = 0
    if not (is_causal or holds["ends_at_highest"]):
        formula.add("last", "kv <= {}", facts.last)
    if in_window:
        number = facts.offset - facts.width
        # A chunk's window begins elsewhere than the one before it.
        formula.parts.append(f"q < kv + {-number}" if facts.offset == 0 else "q + n0 < kv")
    elif not holds["begins_at_lowest"]:
        formula.add("first", "{} <= kv", facts.first)
    # Rows that see nothing have ends that say so, where a tensor holds their ends.
    if holds[f"shows_too_much{case}"] and not formula.tensors:
        formula.add("sees", "{}", facts.sees)
    if not holds[f"all_valid{case}"]:
        formula.add("valid", "{}", getattr(facts, f"valid{case}"), along="kv")
    return MaskContents(
        causal_offset=facts.offset if is_causal else None,
        text=" & ".join(f"({part})" for part in formula.parts),
        tensors=tuple(formula.tensors),
        number=number,
        in_window=in_window,
        tables=tuple(formula.tables),
    )


class _Formula:
    """Parts of a mask that is read, and the tensors in them."""

    def __init__(self, batch: int) -> None:
        self.parts: list[str] = []
        self.tensors: list[Tensor] = []
        self.tables: list[str] = []
        self._varies = batch > 1

    def add(self, table: str, part: str, tensor: Tensor, along: str = "q") -> None:
        """Adds a part with an entry of ``tensor`` [Bm, S], at its place among rows or keys."""
        self.tables.append(table)
        index = f"[b, {along}]" if self._varies else f"[{along}]"
        self.parts.append(part.format(f"t{len(self.tensors)}{index}"))
        self.tensors.append((tensor if self._varies else tensor[0]).contiguous())
