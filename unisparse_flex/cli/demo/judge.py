"""Turns what a model did with the prompt into a row of the table, against the dense model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...evaluation import (
    Prefill,
    Prompt,
    compute_kl,
    compute_log_probs,
    compute_perplexity,
    generate_greedily,
)
from .results import Row

JUDGED_POSITIONS = 1024
ANSWER_TOKENS = 12


@dataclass(eq=False)
class Judge:
    """Compares every run with the first, which is the dense model's.

    KL and perplexity are over the last 1024 positions before the question, none excluded.

    Attributes:
        tokenizer: The model's.
        prompt: What was read.
    """

    tokenizer: Any
    prompt: Prompt
    _reference: Tensor | None = field(default=None, init=False)
    _perplexity: float = field(default=0.0, init=False)

    @property
    def positions(self) -> tuple[int, int]:
        """Prompt positions ``[start, stop)`` whose tokens are predicted."""
        stop = self.prompt.question_start
        return max(1, stop - JUDGED_POSITIONS), stop

    @property
    def logits_to_keep(self) -> int:
        """Last positions of the prompt that need logits: those that predict, and the rest."""
        return self.prompt.tokens - self.positions[0] + 1

    def row(
        self,
        run: Prefill,
        *,
        decoder: Any,
        label: str,
        compile_seconds: float | None = None,
        density: float = 1.0,
        recall: float = 1.0,
    ) -> Row:
        """Returns the row of a run; the first run becomes the reference.

        Args:
            run: A prefilled prompt; answering extends its cache.
            decoder: The uncompiled model, which answers.
            label: Which model, and how it ran.
            compile_seconds: Of the first call.
            density: Kept over causal blocks.
            recall: Dense attention mass inside them.
        """
        start, stop = self.positions
        log_probs = compute_log_probs(run.logits[0, : stop - start])
        targets = self.prompt.input_ids[0, start:stop].to(log_probs.device)
        perplexity = compute_perplexity(log_probs, targets)
        if self._reference is None:
            self._reference, self._perplexity = log_probs, perplexity
        answer = self._answer(run, decoder)
        return Row(
            label=label,
            density=density,
            recall=recall,
            kl=compute_kl(self._reference, log_probs),
            perplexity=perplexity,
            perplexity_ratio=perplexity / self._perplexity,
            answer=answer,
            found=self.prompt.needle.is_in(answer),
            compile_seconds=compile_seconds,
            prefill_seconds=run.seconds,
        )

    def _answer(self, run: Prefill, decoder: Any) -> str:
        stop_ids = {self.tokenizer.eos_token_id, self.tokenizer.bos_token_id}
        ids = generate_greedily(decoder, run, max_tokens=ANSWER_TOKENS, stop_ids=stop_ids)
        return str(self.tokenizer.decode(ids)).strip().split("\n")[0]
