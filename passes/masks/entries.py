"""What the entries of a tensor say, read from the tensor itself."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...block_masks.masks import is_alike_along, read_mask

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Entries that are compared in one step.
CHUNK_ENTRIES = 2**26


@dataclass(frozen=True, kw_only=True, slots=True)
class PairEntries:
    """A tensor [..., Sq, Skv] of two values, one of them where a row sees a key.

    Row ``r`` sees the keys that all of these allow; it stands in no formula what a table of rows or
    keys holds, which is computed from the tensor (`mask_table`).

    Attributes:
        shown: The entry of pairs that take part.
        hidden: The entry of all others; ``None`` where there are none.
        along: The one of the first dimensions along which the tensor differs, if any.
        causal_offset: Keys up to ``r + causal_offset``.
        after: Keys beyond ``r + after``, of a sliding window.
        tables: What else there is, see `MaskContents.tables`.
    """

    shown: float
    hidden: float | None
    along: int | None = None
    causal_offset: int | None = None
    after: int | None = None
    tables: tuple[str, ...] = ()

    def covers(self, found: Entries) -> bool:
        """Whether a formula made for these entries says what ``found`` says, too."""
        if not isinstance(found, PairEntries):
            return False
        if (self.shown, self.causal_offset, self.after) != (
            found.shown,
            found.causal_offset,
            found.after,
        ):
            return False
        values = found.hidden in (self.hidden, None) and (
            self.hidden is not None or found.hidden is None
        )
        places = found.along in (self.along, None)
        return values and places and set(found.tables) <= set(self.tables)


@dataclass(frozen=True, slots=True)
class PositionEntries:
    """A tensor [S] of 0, 1, 2, ... S - 1."""

    def covers(self, found: Entries) -> bool:
        """Whether ``found`` is the same."""
        return found == self


Entries: TypeAlias = PairEntries | PositionEntries


def read_entries(tensor: Tensor) -> Entries | None:
    """Reads a tensor of real entries; waits for the device.

    Args:
        tensor: [..., Sq, Skv], bool, integer or floating; or integers [S].

    Returns:
        ``None`` for a tensor of pairs of more than two values, or of which neither value stands
        where `read_mask` knows what to say; and for one of other positions.
    """
    if tensor.dim() == 1:
        counted = torch.arange(len(tensor), device=tensor.device)
        return PositionEntries() if bool((tensor == counted).all()) else None
    values = _two_values(tensor)
    if values is None:
        return None
    low, high = values
    if low == high:
        return PairEntries(shown=high, hidden=None)
    leading = range(tensor.dim() - 2)
    varying = [i for i in leading if not is_alike_along(tensor, i)]
    if len(varying) > 1:
        return None
    along = varying[0] if varying else None
    kept = tuple(slice(None) if i == along else 0 for i in leading)
    pairs = tensor[kept]
    pairs = pairs[None] if along is None else pairs
    found: PairEntries | None = None
    for shown, hidden in ((high, low), (low, high)):
        seen = pairs if pairs.dtype is torch.bool and shown else pairs == shown
        entries = _read_pairs(seen, shown, hidden, along)
        if entries is not None and (found is None or len(entries.tables) < len(found.tables)):
            found = entries
        if found is not None and not found.tables:
            break
    return found


def _read_pairs(seen: Tensor, shown: float, hidden: float, along: int | None) -> PairEntries | None:
    q_len, kv_len = seen.shape[-2:]
    contents = read_mask(seen[:, None], q_len=q_len, kv_len=kv_len)
    if contents is None:
        return None
    return PairEntries(
        shown=shown,
        hidden=hidden,
        along=along,
        causal_offset=contents.causal_offset,
        after=contents.number if contents.in_window else None,
        tables=contents.tables,
    )


def _two_values(tensor: Tensor) -> tuple[float, float] | None:
    """The lowest and the highest entry, if there are no others."""
    if tensor.dtype is not torch.bool and not (
        tensor.is_floating_point() or tensor.dtype in INTEGERS
    ):
        return None
    # What is expanded is looked at once.
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(axis, 0, min(1, tensor.shape[axis]))
    if tensor.numel() == 0:
        return None
    if tensor.dtype is torch.bool:
        low, high = torch.stack([tensor.all(), tensor.any()]).tolist()
        return float(low), float(high)
    rows = tensor.reshape(-1, tensor.shape[-1])
    parts = rows.split(max(1, CHUNK_ENTRIES // rows.shape[1]))
    ends = [torch.stack(torch.aminmax(part)) for part in parts]
    lowest, highest = torch.stack(ends, 1)
    least, most = lowest.amin(), highest.amax()
    # A NaN is its own end of none, and so another entry.
    others = torch.stack([((part != least) & (part != most)).any() for part in parts]).any()
    found = torch.stack([least.double(), most.double(), others.double()]).tolist()
    return None if found[2] else (found[0], found[1])


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    owner: weakref.ref[Tensor]
    place: tuple[Any, ...]
    entries: Entries | None


_known: dict[int, _Known] = {}
_lock = threading.Lock()


def can_be_read(tensor: Any) -> bool:
    """Whether a tensor has entries of its own, and a count of what changes them in place."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not tensor.is_inference()
        and tensor.layout is torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and tensor.device.type in ("cpu", "cuda")
    )


def is_warmed_up(tensor: Tensor) -> bool:
    """Whether what is done to a tensor now may go into a CUDA graph that a user captures.

    Whoever replays a graph writes its next arguments into the memory of those that it was captured
    with. Graphs are captured, and warmed up for it, on streams other than the default one.
    """
    if not tensor.is_cuda:
        return False
    current = torch.cuda.current_stream(tensor.device)
    return current != torch.cuda.default_stream(tensor.device)


def changes_of(tensor: Tensor) -> tuple[Any, ...]:
    """What differs after a tensor's entries were changed in place, or others put in its place."""
    return tensor._version, tensor.data_ptr(), tensor.shape, tensor.stride()


def entries_of(tensor: Tensor) -> Entries | None:
    """`read_entries` of a tensor that `can_be_read`, once for each version of it.

    ``None`` also while a CUDA graph is captured, when nothing can be read anew.
    """
    place = changes_of(tensor)
    known = _known.get(id(tensor))
    if known is not None and known.owner() is tensor and known.place == place:
        return known.entries
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    with _reading():
        entries = read_entries(tensor.detach())
    with _lock:
        for key in [key for key, value in _known.items() if value.owner() is None]:
            del _known[key]
        _known[id(tensor)] = _Known(weakref.ref(tensor), place, entries)
    return entries


@contextmanager
def _reading() -> Iterator[None]:
    """What a thread that compiles, or a caller's modes, do to operations does not happen here."""
    with torch.no_grad(), torch._C.DisableTorchFunction(), _disable_current_modes():
        yield
