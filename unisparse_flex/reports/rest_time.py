"""Milliseconds of a forward pass outside attention, as `explain`'s own run takes them."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
    first one waits for does not.

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
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        kinds = defaultdict[tuple[str, str], list[float]](list)
        for span in self._frames[0].spans:
            kinds[span.kind].append(self._between(span.start, span.end))
        return sum(median(times) * len(times) for times in kinds.values())

    def _listen(self, stack: ExitStack, module: nn.Module, name: str) -> None:
        kind = re.sub(r"\d+", "#", name), type(module).__name__

        def enter(*_: Any) -> None:
            self._frames.append(_Frame(self._mark()))

        def leave(*_: Any) -> None:
            frame = self._frames.pop()
            above = self._frames[-1]
            if frame.attends:
                above.attends = True
                above.spans += frame.spans
                own = module.parameters(recurse=False)
                self._untimed |= {id(p): p for p in own if p.dim() > 1}
            else:
                above.spans.append(_Span(kind, frame.start, self._mark()))

        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(module.register_forward_hook(leave, always_call=True).remove)

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
