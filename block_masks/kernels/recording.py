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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_local = threading.local()


@dataclass(frozen=True, slots=True)
class _Slot:
    """A tensor by its number: the inputs first, then what was allocated, in order.

    Attributes:
        number: Which one.
        dtype: As what it is read; ``None`` where it is not.
    """

    number: int
    dtype: torch.dtype | None


@dataclass(frozen=True, slots=True)
class _Allocation:
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Launched:
    """A launch.

    Attributes:
        run: Takes ``arguments``, with a tensor for every slot in them.
        arguments: The kernel's.
        slots: Which of them are tensors.
        descriptors: Which of them are descriptors of tensors, whose bases are slots.
        last_used: What no later launch reads.
    """

    run: Callable[[Sequence[Any]], None]
    arguments: list[Any]
    slots: list[tuple[int, _Slot]]
    descriptors: list[tuple[int, _Slot]]
    last_used: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Recording:
    """The steps of one kind of call, without any tensor.

    Attributes:
        device: Where it runs.
        steps: What it allocates and launches.
        outputs: What it returns.
    """

    device: torch.device
    steps: tuple[_Allocation | _Launched, ...]
    outputs: tuple[int, ...]

    def repeat(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Does the same with other tensors of that kind."""
        tensors: list[Any] = list(inputs)
        for step in self.steps:
            if isinstance(step, _Allocation):
                tensors.append(torch.empty(step.shape, dtype=step.dtype, device=self.device))
                continue
            arguments = step.arguments.copy()
            for place, slot in step.slots:
                tensor = tensors[slot.number]
                if slot.dtype is not None and slot.dtype != tensor.dtype:
                    tensor = tensor.view(slot.dtype)
                arguments[place] = tensor
            for place, slot in step.descriptors:
                # Its shape and strides are those of before, and were judged then.
                arguments[place] = copy(arguments[place])
                arguments[place].base = tensors[slot.number]
            step.run(arguments)
            for number in step.last_used:
                tensors[number] = None
        return [tensors[number] for number in self.outputs]


class Recorder:
    """Takes down what a call does while it runs for the first time."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = len(inputs)
        self._device = inputs[0].device
        self._steps: list[_Allocation | _Launched] = []
        # Where tensors lie, the latest of those that lay there one after the other.
        some = [(tensor.data_ptr(), n) for n, tensor in enumerate(inputs) if tensor.numel()]
        self._numbers = dict(some)
        self._count = len(inputs)
        # Two inputs in one place, or something that is neither input nor allocated here.
        self._is_lost = len(self._numbers) < len(some)

    def allocated(self, tensor: Tensor) -> None:
        """Notes what `empty` returned."""
        self._steps.append(_Allocation(tuple(tensor.shape), tensor.dtype))
        self._numbers[tensor.data_ptr()] = self._count
        self._count += 1

    def launched(self, run: Callable[[Sequence[Any]], None], arguments: Sequence[Any]) -> None:
        """Notes a launch: ``run`` does it again with other arguments."""
        kept, slots, descriptors = list(arguments), [], []
        for place, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                slots.append((place, self._slot(argument)))
                kept[place] = None
            elif hasattr(argument, "base"):
                descriptors.append((place, self._slot(argument.base)))
                kept[place] = copy(argument)
                kept[place].base = None
        self._steps.append(_Launched(run, kept, slots, descriptors))

    def _slot(self, tensor: Tensor) -> _Slot:
        if not tensor.numel():
            # Nothing of it is read, whatever is given.
            return _Slot(0, None)
        number = self._numbers.get(tensor.data_ptr())
        self._is_lost |= number is None
        return _Slot(number or 0, tensor.dtype)

    def finish(self, outputs: Sequence[Tensor]) -> Recording | None:
        """The recording; ``None`` where it would not be the same call."""
        numbers = tuple(self._slot(tensor).number for tensor in outputs)
        if self._is_lost:
            return None
        kept, steps = set(range(self._inputs)) | set(numbers), []
        for step in reversed(self._steps):
            if isinstance(step, _Launched):
                used = {slot.number for _, slot in step.slots + step.descriptors}
                step = replace(step, last_used=tuple(used - kept))
                kept |= used
            steps.append(step)
        return Recording(self._device, tuple(reversed(steps)), numbers)


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
