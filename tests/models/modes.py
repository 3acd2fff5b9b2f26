"""How a model is run in the coverage table: forward, generation, padding, chunks.

Every mode is a function of a model and its inputs, so that the same one runs the optimized
model, the untouched one and the float64 oracle. Symbols: B batch, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin

from unisparse_flex.integrations.transformers_names import cache_name

from .family import LENGTH, PADDING_TOKEN, token_ids

LENGTHS = (LENGTH, 150, 61)
OFFSETS = (64, 101)
NEW_TOKENS = 4

Inputs = dict[str, Tensor]
Run = Callable[[Any, Inputs], Tensor]


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to run a model.

    Attributes:
        run: Runs a model on a family's inputs and returns one tensor.
        through: What stands between the optimized model and ``run``.
    """

    run: Run
    through: Literal["eager", "compile", "module.compile", "export"] = "eager"


def forward(model: Any, inputs: Inputs, **options: Any) -> Tensor:
    """The first output of one call."""
    output = model(**inputs, **options)
    return output if isinstance(output, Tensor) else output[0]


def without_cache(model: Any) -> dict[str, Any]:
    """The option of a forward call that returns no cache, for models that have one."""
    has_cache = getattr(getattr(model, "config", None), "use_cache", None) is not None
    return {"use_cache": False} if has_cache else {}


def forward_without_cache(model: Any, inputs: Inputs) -> Tensor:
    """The first output of a call that takes part in no generation."""
    return forward(model, inputs, **without_cache(model))


def padded_batch(side: str) -> Inputs:
    """Rows of unequal lengths, padded on one side: ids and mask, [B, S]."""
    ids = token_ids(len(LENGTHS))
    position = torch.arange(LENGTH)
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = position < lengths if side == "right" else position >= LENGTH - lengths
    return {"input_ids": ids.masked_fill(~mask, PADDING_TOKEN), "attention_mask": mask.long()}


def forward_padded(side: str) -> Run:
    """Outputs of the real tokens of a padded batch: [sum of lengths, V]."""

    def run(model: Any, _: Inputs) -> Tensor:
        batch = padded_batch(side)
        return forward(model, batch)[batch["attention_mask"].bool()]

    return run


def generate(model: Any, inputs: Inputs, **options: Any) -> Tensor:
    """Logits of the generated tokens: [B or beams, new tokens, V]."""
    # Whisper's own `generate` wants a tokenizer's settings.
    output = GenerationMixin.generate(
        model,
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return torch.stack(output.logits, dim=1)


def generate_with(**options: Any) -> Run:
    """Greedy generation from the family's own inputs."""

    def run(model: Any, inputs: Inputs) -> Tensor:
        if "attention_mask" not in inputs and "input_ids" in inputs:
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        return generate(model, inputs, **options)

    return run


def generate_padded(model: Any, _: Inputs) -> Tensor:
    """Greedy generation for a batch padded on the left."""
    return generate(model, padded_batch("left"))


def prefill_in_chunks(model: Any, ids: Tensor, *offsets: int) -> Tensor:
    """Logits of every token, [B, S, V], from one call per chunk with a growing cache."""
    cache = DynamicCache(config=model.config)
    edges = (0, *offsets, ids.shape[1])
    return torch.cat(
        [
            model(input_ids=ids[:, start:stop], **{cache_name(): cache}).logits
            for start, stop in pairwise(edges)
        ],
        dim=1,
    )


def chunked(model: Any, inputs: Inputs) -> Tensor:
    """`prefill_in_chunks` at each of `OFFSETS`, one after another."""
    ids = inputs["input_ids"]
    return torch.cat([prefill_in_chunks(model, ids, offset) for offset in OFFSETS], dim=1)


MODES: dict[str, Mode] = {
    "forward": Mode(forward),
    "forward, right padding": Mode(forward_padded("right")),
    "forward, left padding": Mode(forward_padded("left")),
    "compiled forward": Mode(forward, "compile"),
    "compiled forward, right padding": Mode(forward_padded("right"), "compile"),
    "compiled forward, left padding": Mode(forward_padded("left"), "compile"),
    "generate, DynamicCache": Mode(generate_with()),
    "generate, StaticCache": Mode(generate_with(cache_implementation="static")),
    "generate, padded batch": Mode(generate_padded),
    "compiled generate, DynamicCache": Mode(generate_with(), "module.compile"),
    "compiled generate, StaticCache": Mode(
        generate_with(cache_implementation="static"), "module.compile"
    ),
    "beam search": Mode(generate_with(num_beams=3)),
    "chunked prefill": Mode(chunked),
    "export": Mode(forward_without_cache, "export"),
}
