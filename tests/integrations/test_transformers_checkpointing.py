"""``activation_checkpointing_enable`` of an optimized model: layers run twice, gradients stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.families import BY_NAME
from tests.models.family import SELECTOR
from unisparse_flex import optimize
from unisparse_flex.reports import record_attention

FAMILIES = ("Llama", "Gemma 3", "BERT")

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(family: str, reentrant: bool | None, when: str) -> tuple[dict[str, Tensor], int]:
    """Gradients of an optimized model, and how many of its attention calls were sparse."""
    model: Any = BY_NAME[family].create()
    model.requires_grad_(True).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def enable() -> None:
        options = {"use_reentrant": reentrant}
        model.activation_checkpointing_enable(options)

    if reentrant is not None and when == "before":
        enable()
    optimize(model, SELECTOR, min_length=0)
    if reentrant is not None and when == "after":
        enable()
    with record_attention(model) as calls:
        output = model(**BY_NAME[family].inputs(), **no_cache(model))[0]
        output.square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return grads, sum(call.decision == "sparse" for call in calls)


def no_cache(model: Any) -> dict[str, Any]:
    return {"use_cache": False} if model.config.model_type != "bert" else {}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_run_again_sparse(family: str, reentrant: bool, when: str) -> None:
    plain, once = gradients(family, None, when)
    checkpointed, runs = gradients(family, reentrant, when)
    assert once > 0
    assert runs == 2 * once
    torch.testing.assert_close(checkpointed, plain)
