"""The share of selection in the time of one sparse call.

Selection and attention are timed apart. `UniSparse` selects by its kernels where they take the
call, every other selector as the PyTorch code that it is, compiled only on demand: that takes up to
a minute for each. A selector makes the same operations at every setting, so its selection is timed
once, at the middle setting of its sweep, on the first call that it meets. Attention is timed at
every setting, on the call itself, by the compiled kernel of FlexAttention over the blocks that the
setting keeps. Launches from Python do not count: on CUDA both are replayed as a graph. On the CPU
the seconds are those of the process on one thread: a thread that waits for another counts too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from unisparse_flex import Selector
from unisparse_flex.evaluation import CapturedAttention

from ..calls import block_mask_of, compile_apart
from ..timing import graph_ms, measure

# On the CPU: repeats, and the seconds up to which more are made.
LEAST, BUDGET = 3, 0.5


@dataclass(frozen=True, slots=True)
class Timed:
    """One selection's milliseconds.

    Attributes:
        ms: Median.
        by: ``"kernels"``, ``"PyTorch"`` or ``"compiled PyTorch"``.
    """

    ms: float
    by: str


@dataclass(frozen=True, eq=False)
class ShareClock:
    """Times the calls of one model.

    Attributes:
        sweeps: The settings of every selector; its selection is timed at the middle one.
        compile_selection: Compiles selection that has no kernels.
        selections: What was timed, by middle setting.
    """

    sweeps: Sequence[Sequence[Selector]]
    compile_selection: bool = False
    selections: dict[Selector, Timed] = field(default_factory=dict)

    def measure(self, selector: Selector, inputs: CapturedAttention) -> dict[str, Any]:
        """Times one setting on one call.

        Args:
            selector: A setting out of ``sweeps``.
            inputs: The call.

        Returns:
            ``selection_share`` in [0, 1], selection over selection and attention; both in
            milliseconds, ``selection_ms`` and ``attention_ms``; ``selection_by`` as in `Timed`.
        """
        with torch.no_grad(), _one_thread():
            return self._measure(selector, inputs)

    def _measure(self, selector: Selector, inputs: CapturedAttention) -> dict[str, Any]:
        timed = self._middles[selector]
        if timed not in self.selections:
            self.selections[timed] = self._time_selection(timed, inputs)
        selection = self.selections[timed]
        found = selector.select(inputs.query, inputs.key, is_causal=True, scale=inputs.scale)
        mask = block_mask_of(found)
        attention_ms = _milliseconds(
            lambda: self._attend(inputs.query, inputs.key, inputs.value, mask), inputs.query.device
        )
        return {
            "selection_share": selection.ms / (selection.ms + attention_ms),
            "selection_ms": selection.ms,
            "attention_ms": attention_ms,
            "selection_by": selection.by,
        }

    def _time_selection(self, selector: Selector, inputs: CapturedAttention) -> Timed:
        def select(query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
            selection = selector.select(query, key, is_causal=True, scale=inputs.scale)
            return selection.block_lists()

        query, key = inputs.query, inputs.key
        found = selector.select(query, key, is_causal=True, scale=inputs.scale)
        by = "compiled PyTorch" if self.compile_selection else "PyTorch"
        if found.lists is not None:
            by = "kernels"
        # Uncompiled, what the kernels list would be marked in a table of blocks too.
        run = select if by == "PyTorch" else compile_apart(select, f"select_{len(self.selections)}")
        return Timed(_milliseconds(lambda: run(query, key), query.device), by)

    @cached_property
    def _middles(self) -> dict[Selector, Selector]:
        return {setting: middle(sweep) for sweep in self.sweeps for setting in sweep}

    @cached_property
    def _attend(self) -> Callable[..., Tensor]:
        def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Any:
            return flex_attention(query, key, value, block_mask=mask, enable_gqa=True)

        return compile_apart(attend, "attend_kept")


def middle(sweep: Sequence[Selector]) -> Selector:
    """The setting at which a sweep's selection is timed."""
    return sweep[len(sweep) // 2]


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _milliseconds(function: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        return graph_ms(function)
    return 1e3 * median(measure(function, device.type, least=LEAST, budget=BUDGET))
