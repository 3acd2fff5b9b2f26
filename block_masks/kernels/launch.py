"""Launches of Triton kernels without their binder, which takes longer than a short kernel."""

from __future__ import annotations

from functools import partial
from typing import Any

import triton
from torch import Tensor

from .recording import STREAM, Recorder, recorder_in_force

# Integers beyond these are of another type to Triton.
WIDE = 2**31
# What Triton asks of addresses and of integers.
ALIGNMENT = 16


class Launch:
    """A kernel that is bound once for every kind of arguments, and then only launched.

    Args:
        kernel: What ``triton.jit`` made; its constants stand after its other parameters.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}
        # The interpreter's kernels have no parameters.
        parameters = getattr(kernel, "params", ())
        self._constants = [p.name for p in parameters if p.is_constexpr]
        self._specialised = [not p.do_not_specialize for p in parameters if not p.is_constexpr]

    def __call__(self, grid: tuple[int, int, int], *arguments: Any, **constants: Any) -> None:
        """Launches on the current device, which the tensors are on, and its current stream.

        Args:
            grid: Programs in each dimension.
            arguments: Tensors, descriptors and numbers in the kernel's order; first a tensor.
            constants: The kernel's constants and options of its compilation, by name, in the
                same order each time.
        """
        key = self._key(arguments, constants)
        compiled = self._compiled.get(key)
        if compiled is None:
            # None from the interpreter, which binds every time.
            compiled = self._compiled[key] = self._kernel[grid](*arguments, **constants)
        else:
            compiled[grid](*arguments, *[constants[name] for name in self._constants])
        recorder = recorder_in_force()
        if recorder is not None:
            self._record(recorder, grid, compiled, arguments, constants)

    def _record(
        self,
        recorder: Recorder,
        grid: tuple[int, int, int],
        compiled: Any,
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
    ) -> None:
        """Notes the launch, of arguments for which it was compiled."""
        if compiled is None:
            recorder.launched(partial(self._kernel[grid], **constants), arguments)
            return
        # What ``compiled[grid]`` calls, which asks for hooks and the stream at every launch.
        own = (compiled.function, compiled.packed_metadata, None, None, None)
        values = (constants[name] for name in self._constants)
        every = (*grid, STREAM, *own, *arguments, *values)
        recorder.launched(compiled.run, every, stream_unless_hooked)

    def _key(self, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
        """What Triton compiles anew for."""
        key = [arguments[0].device, *constants.values()]
        for argument, specialised in zip(arguments, self._specialised, strict=False):
            if isinstance(argument, Tensor):
                key += argument.dtype, argument.data_ptr() % ALIGNMENT == 0
            elif isinstance(argument, int):
                if specialised:
                    key += argument == 1, argument % ALIGNMENT == 0
                key.append(-WIDE <= argument < WIDE)
            elif not isinstance(argument, float):
                key += argument.base.dtype, *argument.block_shape
        return tuple(key)


def stream_unless_hooked(device: int) -> int | None:
    """A device's current stream; ``None`` where somebody wants to know of every launch."""
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        # A chain of hooks, which is there without any.
        if getattr(hook, "calls", hook):
            return None
    stream: int = triton.runtime.driver.active.get_current_stream(device)
    return stream
