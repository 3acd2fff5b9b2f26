"""The tokens after a long prompt, decoded with teacher forcing from what is kept of its cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unisparse_flex import optimize, restore
from unisparse_flex.block_masks import DEFAULT_SELECTOR
from unisparse_flex.block_masks.pages import PROMPT_ROWS
from unisparse_flex.evaluation import (
    Prefill,
    TextName,
    compute_kl,
    compute_log_probs,
    prefill,
)
from unisparse_flex.integrations.transformers_names import cache_name

from ..excerpts import encode_excerpt
from ..quality import Subject
from .attention import Observed, Setting, decoding, observing

PREFILLS = ("dense", "sparse")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt(Prefill):
    """A prompt as the model read it.

    Attributes:
        observed: What its last rows looked at.
    """

    observed: Observed


@torch.inference_mode()
def read_prompt(subject: Subject, input_ids: Tensor, kind: str) -> Prompt:
    """The cache of a prompt, the logits of its last token, and what its last rows looked at.

    These rows are dense whatever the kind: what they look at is what is asked for.

    Args:
        subject: The model.
        input_ids: The prompt, int64 [1, S].
        kind: One of `PREFILLS`; sparse is with the library's default selector.
    """
    model = subject.loaded.model
    if kind == "sparse":
        optimize(model, DEFAULT_SELECTOR, min_length=0, dense_layers=subject.dense_layers)
    try:
        start = prefill(model, input_ids[:, :-PROMPT_ROWS], logits_to_keep=1)
    finally:
        if kind == "sparse":
            restore(model)
    with observing(model) as observed:
        last = {cache_name(): start.cache, "use_cache": True, "logits_to_keep": 1}
        output = model(input_ids[:, -PROMPT_ROWS:], **last)
    return Prompt(
        logits=output.logits,
        cache=output[cache_name()],
        seconds=start.seconds,
        observed=observed,
    )


@torch.inference_mode()
def decode(subject: Subject, input_ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits [S, V] of tokens [1, S] after a cache, and the longer cache; the given one stays."""
    output = subject.loaded.model(input_ids, **{cache_name(): copy.deepcopy(cache)}, use_cache=True)
    return output.logits[0], output[cache_name()]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Continuation:
    """A prompt's cache, tokens that follow, and what the dense model says of them.

    Attributes:
        subject: The model.
        input_ids: int64 [1, S], the tokens that follow the prompt.
        cache: That of the prompt.
        observed: What its last rows looked at.
        dense: Log-probabilities [S, V] of prefill and decoding that are both dense.
    """

    subject: Subject
    input_ids: Tensor
    cache: Any
    observed: Observed
    dense: Tensor

    @classmethod
    def read(
        cls,
        subject: Subject,
        text: TextName,
        seed: int,
        *,
        tokens: int,
        decoded: int,
        kinds: Sequence[str] = PREFILLS,
    ) -> dict[str, Continuation]:
        """By kind of prefill, an excerpt of ``tokens`` tokens, the last ``decoded`` decoded."""
        ids = encode_excerpt(subject.loaded, text, tokens=tokens, seed=seed)
        prompt, further = ids[:, :-decoded], ids[:, -decoded:]
        starts = {kind: read_prompt(subject, prompt, kind) for kind in {"dense", *kinds}}
        dense = compute_log_probs(decode(subject, further, starts["dense"].cache)[0])
        return {
            kind: cls(
                subject=subject,
                input_ids=further,
                cache=starts[kind].cache,
                observed=starts[kind].observed,
                dense=dense,
            )
            for kind in kinds
        }

    def judge(self, setting: Setting) -> dict[str, float]:
        """KL per token, the share of equal likeliest tokens, and what was kept."""
        with decoding(self.subject.loaded.model, setting, [self.observed]) as decoder:
            logits, _ = decode(self.subject, self.input_ids, self.cache)
        found = compute_log_probs(logits)
        same = (found.argmax(-1) == self.dense.argmax(-1)).float().mean()
        row = {"kl": compute_kl(self.dense, found), "same_token": float(same)}
        return row | ({"kept": 1.0, "recall": 1.0} if decoder is None else decoder.row())
