"""What a call allocates and launches, recorded once for its kind and then repeated.

To find out shapes, tiles and constants takes the host longer than the kernels of a short prompt
take the GPU. All of it follows from shapes, strides and settings.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

_local = threading.local()
# Where a tensor may begin: more than kernels ask of addresses.
PLACE = 256


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What an argument was, and which: the inputs first, then what was allocated, in order."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """That it takes up where it is allocated."""
        return -(-prod(self.shape) * self.dtype.itemsize // PLACE) * PLACE


@dataclass(frozen=True, slots=True)
class Launched:
    """A launch, to be done again.

    Attributes:
        run: Takes a kernel's arguments.
        by_address: Whether these are addresses of tensors; an interpreter wants tensors.
    """

    run: Callable[..., object]
    by_address: bool


@dataclass(frozen=True, slots=True)
class _Step:
    """A launch with what it reads and writes.

    Attributes:
        launched: The launch.
        arguments: The kernel's.
        tensors: Which of them are tensors.
        descriptors: Which of them are descriptors of tensors.
    """

    launched: Launched
    arguments: list[Any]
    tensors: list[tuple[int, _Tensor]]
    descriptors: list[tuple[int, _Tensor]]


@dataclass(frozen=True, slots=True)
class _Address:
    """A tensor, to those who only ask where it lies."""

    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True, slots=True)
class Recording:
    """The launches of one kind of call, without any tensor.

    What is allocated and not returned shares one piece of memory, the scratch.

    Attributes:
        device: Where it runs.
        launches: In order.
        places: Of tensors by number: which of inputs, outputs and scratch, and the first byte.
        outputs: What it returns.
        scratch: Bytes.
    """

    device: torch.device
    launches: tuple[_Step, ...]
    places: dict[int, tuple[int, int]]
    outputs: tuple[_Tensor, ...]
    scratch: int

    def repeat(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Does the same with other tensors of that kind."""
        device = self.device
        outputs = [torch.empty(o.shape, dtype=o.dtype, device=device) for o in self.outputs]
        bases = [*inputs, *outputs]
        if self.scratch:
            bases.append(torch.empty(self.scratch, dtype=torch.uint8, device=device))
        addresses = [base.data_ptr() for base in bases]
        places = self.places
        for step in self.launches:
            arguments = step.arguments.copy()
            if step.launched.by_address:
                for place, tensor in step.tensors:
                    base, offset = places[tensor.number]
                    arguments[place] = addresses[base] + offset
                for place, tensor in step.descriptors:
                    # Its shape and strides are those of before, and were judged then.
                    base, offset = places[tensor.number]
                    arguments[place] = copy(arguments[place])
                    arguments[place].base = _Address(addresses[base] + offset)
            else:
                for place, tensor in step.tensors:
                    arguments[place] = self._read(tensor, bases)
                for place, tensor in step.descriptors:
                    arguments[place] = copy(arguments[place])
                    arguments[place].base = self._read(tensor, bases)
            step.launched.run(*arguments)
        return outputs

    def _read(self, tensor: _Tensor, bases: Sequence[Tensor]) -> Tensor:
        """A tensor in its place."""
        number, offset = self.places[tensor.number]
        base = bases[number]
        if number < len(bases) - bool(self.scratch):
            return base.view(tensor.dtype)
        size = prod(tensor.shape) * tensor.dtype.itemsize
        return base[offset : offset + size].view(tensor.dtype).view(tensor.shape)


class Recorder:
    """Takes down what a call does while it runs for the first time."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = len(inputs)
        self._device = inputs[0].device
        self._steps: list[_Tensor | _Step] = []
        # Where tensors lie, the latest of those that lay there one after the other.
        some = [(tensor.data_ptr(), n) for n, tensor in enumerate(inputs) if tensor.numel()]
        self._numbers = dict(some)
        self._count = len(inputs)
        # Two inputs in one place, or something that is neither input nor allocated here.
        self._is_lost = len(self._numbers) < len(some)

    def allocated(self, tensor: Tensor) -> None:
        """Notes what `empty` returned."""
        self._numbers[tensor.data_ptr()] = self._count
        self._steps.append(self._tensor(tensor))
        self._count += 1

    def launched(self, launched: Launched, arguments: Sequence[Any]) -> None:
        """Notes a launch of these arguments."""
        kept, tensors, descriptors = list(arguments), [], []
        for place, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                tensors.append((place, self._tensor(argument)))
                kept[place] = None
            elif hasattr(argument, "base"):
                descriptors.append((place, self._tensor(argument.base)))
                kept[place] = copy(argument)
                kept[place].base = None
        self._steps.append(_Step(launched, kept, tensors, descriptors))

    def _tensor(self, tensor: Tensor) -> _Tensor:
        if not tensor.numel():
            # Nothing of it is read, whatever is given.
            return _Tensor(0, (0,), tensor.dtype)
        number = self._numbers.get(tensor.data_ptr())
        self._is_lost |= number is None
        return _Tensor(number or 0, tuple(tensor.shape), tensor.dtype)

    def finish(self, outputs: Sequence[Tensor]) -> Recording | None:
        """The recording; ``None`` where it would not be the same call."""
        returned = tuple(map(self._tensor, outputs))
        numbers = [tensor.number for tensor in returned]
        if self._is_lost or min(numbers, default=self._inputs) < self._inputs:
            return None
        places = {number: (number, 0) for number in range(self._inputs)}
        places |= {number: (self._inputs + i, 0) for i, number in enumerate(numbers)}
        scratch = self._share_scratch(places, self._inputs + len(returned))
        launches = tuple(step for step in self._steps if isinstance(step, _Step))
        return Recording(self._device, launches, places, returned, scratch)

    def _share_scratch(self, places: dict[int, tuple[int, int]], base: int) -> int:
        """Adds the places of what is not returned, behind what is in use beside it; the bytes."""
        last_used: dict[int, int] = {}
        for at, step in enumerate(self._steps):
            if isinstance(step, _Step):
                used = (tensor.number for _, tensor in step.tensors + step.descriptors)
                last_used |= dict.fromkeys(used, at)
        total = 0
        # First byte, the byte behind, and the last step that reads it.
        in_use: list[tuple[int, int, int]] = []
        for at, step in enumerate(self._steps):
            if not isinstance(step, _Tensor) or step.number in places:
                continue
            in_use = sorted(piece for piece in in_use if piece[2] > at)
            start = 0
            for first, behind, _ in in_use:
                if first - start >= step.bytes:
                    break
                start = behind
            places[step.number] = base, start
            in_use.append((start, start + step.bytes, last_used.get(step.number, at)))
            total = max(total, start + step.bytes)
        return total


def recorder_in_force() -> Recorder | None:
    """Who records the call that is running in this thread."""
    return getattr(_local, "recorder", None)


@contextmanager
def recording(inputs: Sequence[Tensor]) -> Iterator[Recorder]:
    """Records what is allocated by `empty` and launched by `Launch` inside."""
    _local.recorder = recorder = Recorder(inputs)
    try:
        yield recorder
    finally:
        _local.recorder = None


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty``, recorded."""
    tensor = like.new_empty(shape, dtype=dtype)
    recorder = recorder_in_force()
    if recorder is not None:
        recorder.allocated(tensor)
    return tensor


class Recordings:
    """The recordings of the latest kinds of calls.

    Args:
        most: How many are kept.
    """

    def __init__(self, most: int = 256) -> None:
        self._found: OrderedDict[Hashable, Recording] = OrderedDict()
        self._most = most
        self._lock = threading.Lock()

    def run(
        self,
        kind: Hashable,
        inputs: Sequence[Tensor],
        compute: Callable[[], Sequence[Tensor]],
    ) -> Sequence[Tensor]:
        """What ``compute`` returns, by its recording where there is one.

        Args:
            kind: What it does follows from this and from `kind_of` its inputs.
            inputs: The tensors that it reads.
            compute: Does it for the first time.
        """
        key = (kind, *map(kind_of, inputs))
        with self._lock:
            found = self._found.get(key)
            if found is not None:
                self._found.move_to_end(key)
        if found is not None:
            return found.repeat(inputs)
        with recording(inputs) as recorder:
            outputs = compute()
        made = recorder.finish(outputs)
        if made is not None:
            with self._lock:
                self._found[key] = made
                while len(self._found) > self._most:
                    self._found.popitem(last=False)
        return outputs


def kind_of(tensor: Tensor) -> Hashable:
    """What allocations and launches may depend on."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16
