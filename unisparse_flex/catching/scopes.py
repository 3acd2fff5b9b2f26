"""Within what a thread's attention calls are caught, and with which settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..passes.attend import is_watched
from .dispatch_key import can_catch_attention, catch_attention, in_force, leave_attention
from .function_mode import SparseAttentionMode


def run_sparse(config: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls ``function``; attention calls inside become the marker operator with these settings."""
    if torch.compiler.is_compiling():
        with SparseAttentionMode(config):
            return function(*args, **kwargs)
    if not can_catch_attention():
        return run_under_mode(config, function, *args, **kwargs)
    with catch_attention(config):
        return function(*args, **kwargs)


def run_under_mode(config: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`run_sparse` of an eager call by a function mode, which sees more than the dispatch key."""
    with leave_attention(), SparseAttentionMode(config):
        return function(*args, **kwargs)


def config_in_force() -> str | None:
    """The settings that attention calls of this thread are caught with, traced or not."""
    for depth in reversed(range(torch._C._len_torch_function_stack())):
        mode = torch._C._get_function_stack_at(depth)
        if isinstance(mode, SparseAttentionMode):
            return mode.config
    return None if torch.compiler.is_compiling() else in_force.config


def is_seen_here() -> bool:
    """Whether somebody traces or watches the attention calls of this thread."""
    return torch.compiler.is_compiling() or is_watched() or torch._C._len_torch_function_stack() > 0


def is_in_force(config: str) -> bool:
    """Whether eager calls are caught with these settings already."""
    if torch.compiler.is_compiling():
        return False
    depth = torch._C._len_torch_function_stack()
    if depth == 0:
        return in_force.config == config
    mode = torch._C._get_function_stack_at(depth - 1)
    return isinstance(mode, SparseAttentionMode) and mode.config == config
