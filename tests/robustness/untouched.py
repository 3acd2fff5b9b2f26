"""What `optimize` and a call may change outside a model, and a model's own state."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import eval_frame

from unisparse_flex import is_optimized
from unisparse_flex.catching import dispatch_key as dispatch
from unisparse_flex.catching.dispatch_key import in_force
from unisparse_flex.passes.attend import marker
from unisparse_flex.passes.attend.marker import is_watched

SDPA, MULTIHEAD = F.scaled_dot_product_attention, F.multi_head_attention_forward


def assert_nothing_is_left() -> None:
    """Asserts that no attention is caught in this thread, and that torch is as it was."""
    assert F.scaled_dot_product_attention is SDPA
    assert F.multi_head_attention_forward is MULTIHEAD
    assert torch._C._len_torch_function_stack() == 0
    assert torch._C._len_torch_dispatch_stack() == 0
    assert in_force.config is None
    assert dispatch._key is None or not dispatch._key.is_on()
    assert not is_watched()
    assert not getattr(marker._compiling, "active", False)
    assert eval_frame._stance.stance == "default"


def state_of(model: nn.Module) -> list[tuple[str, Any]]:
    """Classes, attributes (less what `torch.compile` sets) and hooks of every module."""
    return [
        (
            name,
            (
                type(module),
                sorted(module.__dict__.keys() - {"_is_torch_compile"}),
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                getattr(module, "activation_relu_or_gelu", None),
            ),
        )
        for name, module in model.named_modules()
    ]


def assert_as_before(model: nn.Module, state: list[tuple[str, Any]]) -> None:
    """Asserts that a model is as it was when `state_of` saw it, and torch too."""
    assert not is_optimized(model)
    assert state_of(model) == state
    assert_nothing_is_left()
