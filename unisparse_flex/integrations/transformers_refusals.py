"""What transformers' SDPA function cannot run, or models do only by the name "sdpa"."""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache
from typing import Any

import torch
from torch import nn

# Arguments that say what attention is, and that transformers' SDPA function ignores.
NOT_IN_SDPA = {
    "softcap": "a soft cap on the logits",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "keys chosen by the model",
    "block_indices": "blocks chosen by the model",
}
BY_NAME = re.compile(r"""_attn_implementation\s*(==|!=|(not\s+)?in)[^\n]*["']sdpa["']""")


def refuse_arguments(module: nn.Module, arguments: dict[str, Any]) -> None:
    """Raises where SDPA would leave out what a model asks of attention.

    Raises:
        NotImplementedError: It would.
    """
    for name, what in NOT_IN_SDPA.items():
        if arguments.get(name) is not None:
            raise NotImplementedError(
                f"{name} must be None, got {what} from {type(module).__name__}, which no SDPA "
                "kernel computes; use attn_implementation='eager' for this model"
            )


def refuse_module(module: nn.Module) -> None:
    """Raises where a model's attention is not what its attention function computes.

    Raises:
        NotImplementedError: No model of its file supports SDPA, or the file asks whether the
            implementation is "sdpa" by name.
    """
    message = _obstacle(type(module))
    if message is not None:
        raise NotImplementedError(message)


@torch.compiler.assume_constant_result
def _obstacle(cls: type) -> str | None:
    return _find_obstacle(cls)


@cache
def _find_obstacle(cls: type) -> str | None:
    from transformers import PreTrainedModel

    file = sys.modules.get(cls.__module__)
    models: list[Any] = [
        value
        for value in vars(file).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == cls.__module__
    ]
    if models and not any(model._supports_sdpa for model in models):
        return (
            f"a registered attention function runs where 'sdpa' does, got {cls.__name__}, whose "
            "models do not support it; use attn_implementation='eager' for this model"
        )
    try:
        source = inspect.getsource(file) if file is not None else ""
    except (OSError, TypeError):
        return None
    if BY_NAME.search(source):
        return (
            f"a registered attention function must be all that a model asks for, got "
            f"{cls.__name__}, whose file asks for the name 'sdpa' too; keep "
            "attn_implementation='sdpa' and call unisparse_flex.optimize(model)"
        )
    return None
