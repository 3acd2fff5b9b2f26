"""What a call allocates and launches, recorded once for its kind and then repeated.

To find out shapes, tiles and constants takes the host longer than the kernels of a short prompt
take the GPU. All of it follows from shapes, strides and settings.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]

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


class Stream:
    """Stands among arguments of a launch for the stream that it goes to."""


STREAM = Stream()
# The current stream of a device; ``None`` where launches are not to be repeated.
StreamOf = Callable[[int], int | None]


@dataclass(frozen=True, slots=True)
class _Step:
    """A launch with what it reads and writes.

    Attributes:
        run: Launches, given all arguments.
        arguments: `STREAM`, `_Tensor`, descriptors whose base is one, or what never changes.
    """

    run: Callable[..., object]
    arguments: list[Any]

    def tensors(self) -> Iterator[_Tensor]:
        """What it reads and writes."""
        for argument in self.arguments:
            found = getattr(argument, "base", argument)
            if isinstance(found, _Tensor):
                yield found


@dataclass(frozen=True, slots=True)
class _Address:
    """A tensor, to those who only ask where it lies."""

    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True, slots=True)
class Recording:
    """The launches of one kind of call, without any tensor.

    What is allocated and not returned shares one piece of memory, the scratch. Arguments are picked
    from one list: the stream, tensors in their places, descriptors, and what never changes.

    Attributes:
        device: Where it runs.
        stream_of: Where launches take addresses and a stream; ``None`` where they take tensors.
        outputs: Shape, strides and dtype of what it returns, and of the scratch behind that.
        returned: How many of these it returns.
        places: Of tensors: which of inputs and ``outputs``, the first byte, and what lies there.
        descriptors: Descriptors without a base, and which of ``places`` that is.
        constants: What never changes.
        launches: How each launches, and picks its arguments.
    """

    device: torch.device
    stream_of: StreamOf | None
    outputs: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    returned: int
    places: tuple[tuple[int, int, _Tensor], ...]
    descriptors: tuple[tuple[Any, int], ...]
    constants: tuple[Any, ...]
    launches: tuple[tuple[Callable[..., object], Callable[[list[Any]], tuple[Any, ...]]], ...]

    def repeat(self, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """Does the same with other tensors of that kind; ``None`` where that is not to be done."""
        stream_of, device = self.stream_of, self.device
        if device.type == "cuda":
            made = [_empty_strided_cuda(*output) for output in self.outputs]
        else:
            made = [torch.empty_strided(s, t, dtype=d, device=device) for s, t, d in self.outputs]
        bases = [*inputs, *made]
        if stream_of is None:
            values: list[Any] = [None, *(self._read(bases, *place) for place in self.places)]
            values += [_on(found, values[1 + place]) for found, place in self.descriptors]
        else:
            stream = stream_of(device.index)
            if stream is None:
                return None
            starts = [base.data_ptr() for base in bases]
            values = [stream, *(starts[base] + first for base, first, _ in self.places)]
            # Its shape and strides are those of before, and were judged then.
            values += [_on(found, _Address(values[1 + at])) for found, at in self.descriptors]
        values += self.constants
        for run, pick in self.launches:
            run(*pick(values))
        return made[: self.returned]

    def _read(self, bases: Sequence[Tensor], number: int, first: int, tensor: _Tensor) -> Tensor:
        """A tensor in its place."""
        base = bases[number]
        if number < len(bases) - len(self.outputs) + self.returned:
            return base.view(tensor.dtype)
        size = prod(tensor.shape) * tensor.dtype.itemsize
        return base[first : first + size].view(tensor.dtype).view(tensor.shape)


def _on(descriptor: Any, base: Any) -> Any:
    """A descriptor of another tensor; `copy` takes five times as long."""
    made = object.__new__(type(descriptor))
    made.__dict__.update(descriptor.__dict__)
    made.base = base
    return made


class Recorder:
    """Takes down what a call does while it runs for the first time."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self._inputs = len(inputs)
        self._device = inputs[0].device
        self._steps: list[_Tensor | _Step] = []
        # Where tensors lie, the latest of those that lay there one after the other.
        self._numbers = {t.data_ptr(): n for n, t in enumerate(inputs) if t.numel()}
        self._count = len(inputs)
        self._stream_of: StreamOf | None = None
        # Whether something is neither input nor allocated here.
        self._is_lost = False

    def allocated(self, tensor: Tensor) -> None:
        """Notes what `empty` returned."""
        self._numbers[tensor.data_ptr()] = self._count
        self._steps.append(self._tensor(tensor))
        self._count += 1

    def launched(
        self,
        run: Callable[..., object],
        arguments: Sequence[Any],
        stream_of: StreamOf | None = None,
    ) -> None:
        """Notes a launch.

        Args:
            run: Does it again.
            arguments: All that ``run`` takes, with `STREAM` where the stream stands.
            stream_of: The current stream, where ``run`` takes one, and tensors as addresses.
        """
        self._stream_of = stream_of
        self._steps.append(_Step(run, [self._noted(argument) for argument in arguments]))

    def _noted(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self._tensor(argument)
        if isinstance(getattr(argument, "base", None), Tensor):
            return _on(argument, self._tensor(argument.base))
        return argument

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
        made = [(t.shape, _strides(t.shape), t.dtype) for t in returned]
        if scratch:
            made.append(((scratch,), (1,), torch.uint8))
        launches = [step for step in self._steps if isinstance(step, _Step)]
        tensors = list(dict.fromkeys(tensor for step in launches for tensor in step.tensors()))
        given = [a for step in launches for a in step.arguments if not isinstance(a, _Tensor)]
        descriptors = [a for a in given if isinstance(getattr(a, "base", None), _Tensor)]
        described = {id(a) for a in descriptors}
        constants = [a for a in given if a is not STREAM and id(a) not in described]
        # Where arguments stand in the list that `repeat` makes.
        at_tensors = {tensor: 1 + i for i, tensor in enumerate(tensors)}
        behind = 1 + len(tensors)
        at = {id(STREAM): 0} | {id(a): behind + i for i, a in enumerate(descriptors)}
        behind += len(descriptors)
        at |= {id(a): behind + i for i, a in enumerate(constants)}
        return Recording(
            device=self._device,
            stream_of=self._stream_of,
            outputs=tuple(made),
            returned=len(returned),
            places=tuple((*places[tensor.number], tensor) for tensor in tensors),
            descriptors=tuple((_on(a, None), at_tensors[a.base] - 1) for a in descriptors),
            constants=tuple(constants),
            launches=tuple(
                (
                    step.run,
                    _picker(
                        [
                            at_tensors[a] if isinstance(a, _Tensor) else at[id(a)]
                            for a in step.arguments
                        ]
                    ),
                )
                for step in launches
            ),
        )

    def _share_scratch(self, places: dict[int, tuple[int, int]], base: int) -> int:
        """Adds the places of what is not returned, behind what is in use beside it; the bytes."""
        last_used: dict[int, int] = {}
        for at, step in enumerate(self._steps):
            if isinstance(step, _Step):
                last_used |= dict.fromkeys((tensor.number for tensor in step.tensors()), at)
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


def _picker(places: Sequence[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    """Picks what stands in these places of a list."""
    return itemgetter(*places) if len(places) > 1 else lambda values: (values[places[0]],)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a contiguous tensor."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


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
        key = (kind, shared_places(inputs), *map(kind_of, inputs))
        with self._lock:
            found = self._found.get(key)
            if found is not None:
                self._found.move_to_end(key)
        repeated = None if found is None else found.repeat(inputs)
        if repeated is not None:
            return repeated
        with recording(inputs) as recorder:
            outputs = compute()
        made = recorder.finish(outputs)
        if made is not None:
            with self._lock:
                self._found[key] = made
                while len(self._found) > self._most:
                    self._found.popitem(last=False)
        return outputs


def shared_places(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Which of the tensors begins where each begins; nothing where all lie apart.

    A recording takes those that begin in one place for one.
    """
    places = [tensor.data_ptr() for tensor in tensors]
    return () if len(set(places)) == len(places) else tuple(map(places.index, places))


def kind_of(tensor: Tensor) -> Hashable:
    """What allocations and launches may depend on."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16
