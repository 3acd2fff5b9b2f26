"""Milliseconds of a forward pass outside attention, as `explain`'s own run takes them."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

# Share of the weights that modules with attention calls may hold themselves and still be ignored.
MOST_UNTIMED = 0.01


@dataclass(frozen=True, slots=True)
class _Span:
    """One call of a module: what stands for its kind, and marks of its beginning and end."""

    kind: tuple[str, str]
    start: Any
    end: Any


@dataclass(slots=True)
class _Frame:
    start: Any
    attends: bool = False
    spans: list[_Span] = field(default_factory=list)


class RestClock:
    """Times the outermost modules that make no attention call: projections, MLPs, norms, heads.

    What a module with attention calls computes itself, such as adding residuals, is left out. The
    layers of a stack do the same work: each counts as the median of them, so that what only the
    first one waits for does not. What a forward calls once is called once more for its time.

    Attributes:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        devices = {parameter.device for parameter in module.parameters()}
        self._device = devices.pop() if len(devices) == 1 else None
        self._frames: list[_Frame] = [_Frame(None)]
        # Weights of modules that attend, by identity: shared ones count once.
        self._untimed: dict[int, Tensor] = {}
        self._again: dict[tuple[str, str], Callable[[], object] | None] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Listens to the modules' calls inside."""
        with ExitStack() as stack:
            for name, submodule in self.module.named_modules():
                self._listen(stack, submodule, name)
            yield

    def saw_attention(self) -> None:
        """Says that the running module made an attention call."""
        self._frames[-1].attends = True

    @property
    def milliseconds(self) -> float | None:
        """What was timed, in all; ``None`` where it is not everything that takes long.

        That is so on several devices, or where a module that attends holds weights of its own.
        """
        weights = sum(parameter.numel() for parameter in self.module.parameters())
        untimed = sum(weight.numel() for weight in self._untimed.values())
        if self._device is None or untimed > MOST_UNTIMED * weights:
            return None
        self._wait()
        kinds = defaultdict[tuple[str, str], list[_Span]](list)
        for span in self._frames[0].spans:
            kinds[span.kind].append(span)
        return sum(self._milliseconds_of(spans) for spans in kinds.values())

    def _milliseconds_of(self, spans: list[_Span]) -> float:
        """All calls of one kind."""
        again = self._again[spans[0].kind]
        if again is not None and not self.module.training:
            start = self._mark()
            with torch.no_grad():
                again()
            spans = [replace(spans[0], start=start, end=self._mark())]
            self._wait()
        return median(self._between(span.start, span.end) for span in spans) * len(spans)

    def _listen(self, stack: ExitStack, module: nn.Module, name: str) -> None:
        kind = re.sub(r"\d+", "#", name), type(module).__name__

        def enter(*_: Any) -> None:
            self._frames.append(_Frame(self._mark()))

        def leave(_: nn.Module, args: Any, kwargs: Any, _result: Any) -> None:
            frame = self._frames.pop()
            above = self._frames[-1]
            if frame.attends:
                above.attends = True
                above.spans += frame.spans
                own = module.parameters(recurse=False)
                self._untimed |= {id(p): p for p in own if p.dim() > 1}
            else:
                above.spans.append(_Span(kind, frame.start, self._mark()))
                # Inputs are held for one call of a kind, and let go where there is another.
                again = partial(module.forward, *args, **kwargs)
                self._again[kind] = None if kind in self._again else again

        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(
            module.register_forward_hook(leave, with_kwargs=True, always_call=True).remove
        )

    def _wait(self) -> None:
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _mark(self) -> Any:
        if self._device is not None and self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        return time.perf_counter()

    def _between(self, start: Any, end: Any) -> float:
        if self._device is not None and self._device.type == "cuda":
            return float(start.elapsed_time(end))
        return 1e3 * float(end - start)
