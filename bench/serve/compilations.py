"""Counts what is compiled while something runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.utils import counters


@contextmanager
def counting_compilations() -> Iterator[Counter[str]]:
    """Kernels of Triton by name, and graphs of Dynamo, that are compiled inside."""
    found: Counter[str] = Counter()
    before = counters["stats"]["unique_graphs"]
    try:
        import triton

        runtime: Any = triton.knobs.runtime
    except (ImportError, AttributeError):
        runtime = None

    def note(*_: Any, **given: Any) -> None:
        found[str(getattr(given.get("fn"), "name", "kernel"))] += 1

    if runtime is not None and torch.cuda.is_available():
        earlier = runtime.jit_post_compile_hook
        runtime.jit_post_compile_hook = note
    try:
        yield found
    finally:
        if runtime is not None and torch.cuda.is_available():
            runtime.jit_post_compile_hook = earlier
        graphs = counters["stats"]["unique_graphs"] - before
        if graphs:
            found["torch.compile"] = graphs
