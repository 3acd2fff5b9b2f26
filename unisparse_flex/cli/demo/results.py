"""What a run of the demo found, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...evaluation import Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One model's column of the table.

    Attributes:
        label: ``"dense"`` or the selector's name, and how it ran.
        density: Kept over causal blocks, mean over layers and heads.
        recall: Dense attention mass inside the kept blocks, mean over layers, heads and rows.
        kl: Mean KL(dense || this) in nats over the judged positions.
        perplexity: Over the judged positions.
        perplexity_ratio: To the dense model's.
        answer: The first line of what the model said.
        found: Whether the needle's value is in it.
        compile_seconds: First call, compilation included; ``None`` where nothing was compiled.
        prefill_seconds: Whole prompt to first token, warm; median of the repeats.
    """

    label: str
    density: float
    recall: float
    kl: float
    perplexity: float
    perplexity_ratio: float
    answer: str
    found: bool
    compile_seconds: float | None
    prefill_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Layer:
    """What the selector chose in one layer, on the dense model's queries and keys.

    Attributes:
        density: Kept over causal blocks, mean over heads.
        recall: Dense attention mass inside the kept blocks, mean over heads and sampled rows.
        kept: Share of the heads that keep a block, float32 [N, N] on CPU.
    """

    density: float
    recall: float
    kept: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DemoResult:
    """Everything that the table, the figure and the JSON file show.

    Attributes:
        prompt: What the model read.
        judged: Prompt positions ``[start, stop)`` whose tokens were predicted for KL and
            perplexity: the text right before the question.
        rows: The dense model first, the optimized one last.
        layers: One per attention layer.
        heads: Query heads per layer.
        repeats: Timed prefills of each model, in turn.
        decode_calls: Attention calls of the optimized model's decoding, counted by
            decision and reason.
        notes: What has to be known of the times.
        device: The device in words.
        dtype: Of weights and activations.
    """

    prompt: Prompt
    judged: tuple[int, int]
    rows: tuple[Row, ...]
    layers: tuple[Layer, ...]
    heads: int
    repeats: int
    decode_calls: Mapping[tuple[str, str | None], int]
    notes: tuple[str, ...]
    device: str
    dtype: str

    @property
    def dense(self) -> Row:
        """The dense model, eager."""
        return self.rows[0]

    @property
    def optimized(self) -> Row:
        """The optimized model."""
        return self.rows[-1]
