"""Whether operations are computed or recorded."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def is_tracing() -> bool:
    """Whether this thread's operations are recorded into a graph, by whatever tracer."""
    return (
        torch.compiler.is_compiling()
        or get_proxy_mode() is not None
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
    )
