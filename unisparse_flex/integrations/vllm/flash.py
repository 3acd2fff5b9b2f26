"""The backend over vLLM's FlashAttention."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from .create_backend import create_backend
from .kernels import FlashKernel

FlashBackend: Any = create_backend(FlashAttentionBackend, FlashKernel())
# vLLM finds it again by its full name.
FlashBackend.__module__, FlashBackend.__name__ = __name__, "FlashBackend"
FlashBackend.__qualname__ = FlashBackend.__name__
