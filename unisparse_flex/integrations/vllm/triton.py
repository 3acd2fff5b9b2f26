"""The backend over vLLM's kernel in Triton."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from .create_backend import create_backend
from .kernels import TritonKernel

TritonBackend: Any = create_backend(TritonAttentionBackend, TritonKernel())
# vLLM finds it again by its full name.
TritonBackend.__module__, TritonBackend.__name__ = __name__, "TritonBackend"
TritonBackend.__qualname__ = TritonBackend.__name__
