"""Names that options take, as the library has them: help lists them without importing torch."""

from __future__ import annotations

BUNDLED = "smollm2"
# `evaluation.CONTEXT_LENGTH` and `evaluation.TEXT_NAMES`.
BUNDLED_CONTEXT = 8192
# Of SmolLM2-135M.
BUNDLED_LAYERS = 30
TEXT_NAMES = ("prose", "code", "topics")
# `passes.calls.BACKENDS`.
BACKENDS = ("auto", "flash", "triton")
# `selectors.selector_of_quality`.
QUALITY_NAMES = ("fast", "balanced", "high")
LEAST_QUALITY = 0.1
# `cli.selectors.NAMED`.
SELECTOR_NAMES = ("default", "fast", "balanced", "high", "paper")
