"""The backend over vLLM's kernel for the CPU, which the tests run on."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from .create_backend import create_backend
from .kernels import CpuKernel

CpuBackend: Any = create_backend(CPUAttentionBackend, CpuKernel(), needs_settings=True)
# vLLM finds it again by its full name.
CpuBackend.__module__, CpuBackend.__name__ = __name__, "CpuBackend"
CpuBackend.__qualname__ = CpuBackend.__name__
