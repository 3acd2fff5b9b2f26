"""How an eager model's attention calls are caught: by a dispatch key that only they know.

Inside `catch_attention` the key is on in this thread. Every operator falls through it at no cost
but ``aten::scaled_dot_product_attention`` and the marker, which have kernels there.
"""

from __future__ import annotations

import ctypes
import logging
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from ..passes import SparseConfig
from ..passes.attend import is_watched, marked_sdpa
from ..passes.calls import TORCH_SDPA, SdpaCall, is_tracing
from .causal_bias import resolve_causal_bias

logger = logging.getLogger(__name__)

KEY_NAME = "TESTING_ONLY_GenericMode"
# Kept beside the key, so that a thread that inherits the one (backward's) inherits the other.
SCOPE_NAME = "unisparse_flex_scope"


@dataclass(slots=True, eq=False)
class Scope:
    """One `catch_attention`.

    Attributes:
        config: The settings in force inside.
        min_queries: Calls of fewer stay dense, whatever else they are.
    """

    config: str
    min_queries: float

    @classmethod
    def create(cls, config: str) -> Scope:
        """The scope of encoded settings."""
        settings = SparseConfig.decode(config)
        if settings.context is not None:
            # How many queries a call has, and its dense output too, all ranks say together.
            return cls(config, 0)
        return cls(config, math.inf if settings.dense else settings.min_queries)


class InForce(threading.local):
    """The settings of this thread's innermost `catch_attention`: every module's forward asks."""

    config: str | None = None


in_force = InForce()


class _Key:
    """The dispatch key and what is registered for it."""

    def __init__(self) -> None:
        self.key: Any = torch._C._parse_dispatch_key(KEY_NAME)
        if self.key is None or torch._C._dispatch_has_backend_fallback(self.key):
            raise RuntimeError(f"the dispatch key {KEY_NAME} is missing or taken")
        self.keys = torch._C.DispatchKeySet(self.key)
        self._takes_reference = _stash_takes_reference()
        self._pass_higher_order_operators()
        self.libraries = [torch.library.Library(name, "IMPL", KEY_NAME) for name in _KERNELS]
        for library, (operator, kernel) in zip(self.libraries, _KERNELS.values(), strict=True):
            library.impl(operator, kernel)
        self.rest = torch.library.Library("_", "IMPL", KEY_NAME)
        self.rest.fallback(torch.library.fallthrough_kernel)

    def _pass_higher_order_operators(self) -> None:
        """They dispatch in Python, where the fallback is not seen."""
        by_default: Any = torch._ops._HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS
        by_default.append(self.key)
        for operator in torch._ops._higher_order_ops.values():
            operator.fallthrough(self.key)

    def stash(self, scope: Scope | None) -> None:
        """Sets what the key does in this thread."""
        if not self._takes_reference:
            _increase_references(scope)
        torch._C._stash_obj_in_tls(SCOPE_NAME, scope)

    def scope(self) -> Scope | None:
        """What the key does in this thread now."""
        if not torch._C._dispatch_tls_is_dispatch_key_included(self.key):
            return None
        scope: Scope | None = torch._C._get_obj_in_tls(SCOPE_NAME)
        return scope

    def is_off(self) -> bool:
        """Whether `off` is in force in this thread."""
        return torch._C._dispatch_tls_is_dispatch_key_excluded(self.key)

    def off(self) -> AbstractContextManager[None]:
        return torch._C._ExcludeDispatchKeyGuard(self.keys)


_increase_references = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", ctypes.pythonapi))


def _stash_takes_reference() -> bool:
    """Whether torch's thread-local store counts the reference that it later drops.

    torch 2.11 does not: what is stashed again and again would be freed while it is in use.
    """
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls(SCOPE_NAME, probe)
    takes = sys.getrefcount(probe) > before
    if not takes:
        _increase_references(probe)
    return takes


@cache
def _find_key() -> _Key | None:
    """The key, set up at the first call; ``None`` where this torch has none to spare."""
    try:
        key = _Key()
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    _catch_causal_bias(key)
    return key


_key: _Key | None = None
# Two threads that set up one key each would find it taken.
_setting_up = threading.Lock()


def set_up_key() -> None:
    """Registers the kernels; again changes nothing."""
    global _key
    with _setting_up:
        _key = _find_key()


def can_catch_attention() -> bool:
    """Whether `catch_attention` sees what a function mode would see here.

    Not where calls are traced, nor where a mode that somebody else entered watches them.
    """
    return not (
        is_tracing()
        or _key is None
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
    )


@contextmanager
def catch_attention(config: str) -> Iterator[None]:
    """Turns the attention calls of this thread into the marker operator with these settings."""
    assert _key is not None
    outer, outer_config = _key.scope(), in_force.config
    scope = Scope.create(config)
    try:
        _key.stash(scope)
        in_force.config = config
        with torch._C._IncludeDispatchKeyGuard(_key.key):
            yield
    finally:
        _key.stash(outer)
        in_force.config = outer_config


def leave_attention() -> AbstractContextManager[None]:
    """Inside, no outer `catch_attention` catches."""
    return nullcontext() if _key is None else _key.off()


@contextmanager
def suspend_attention() -> Iterator[None]:
    """Inside, the scope in force does not catch; the key stays on.

    For what `torch.compile` undoes before it restores the dispatch keys: it would restore what
    `leave_attention` did.
    """
    assert _key is not None
    scope, config = _key.scope(), in_force.config
    _key.stash(None)
    in_force.config = None
    try:
        yield
    finally:
        _key.stash(scope)
        in_force.config = config


def scope_in_force() -> Scope | None:
    """The `catch_attention` that would see an attention call of this thread."""
    return None if _key is None or _key.is_off() else _key.scope()


def _sdpa(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.ops.aten.scaled_dot_product_attention` where the key is on."""
    assert _key is not None
    scope: Scope | None = torch._C._get_obj_in_tls(SCOPE_NAME)
    # Cheaper than a guard: decoding pays for what stands here.
    torch._C._dispatch_tls_set_dispatch_key_excluded(_key.key, True)
    try:
        if scope is None or query.is_nested:
            return TORCH_SDPA(query, *args, **kwargs)
        if (
            type(query) is Tensor
            and query.dim() == 4
            and query.shape[2] < scope.min_queries
            and not torch._C._len_torch_dispatch_stack()
            and not is_watched()
        ):
            return TORCH_SDPA(query, *args, **kwargs)
        if torch.compiler.is_compiling():
            logger.warning("attention that a forward traces by itself stays dense")
            return TORCH_SDPA(query, *args, **kwargs)
        call = SdpaCall.bind((query, *args), kwargs)
        return marked_sdpa(call, scope.config)
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(_key.key, False)


def _marker(*args: Any, **kwargs: Any) -> Tensor:
    """`torch.ops.unisparse.sdpa` where the key is on: what it calls is not caught again."""
    assert _key is not None
    with _key.off():
        output: Tensor = torch.ops.unisparse.sdpa(*args, **kwargs)
        return output


_KERNELS = {
    "aten": ("scaled_dot_product_attention", _sdpa),
    "unisparse": ("sdpa", _marker),
}


def _catch_causal_bias(key: _Key) -> None:
    """Catches calls with a `CausalBias`: it calls CUDA's kernels itself, past SDPA."""
    dispatch = CausalBias._dispatch

    @wraps(dispatch)
    def caught(*args: Any, **kwargs: Any) -> Tensor:
        scope = None if torch.compiler.is_compiling() else scope_in_force()
        if scope is None:
            return dispatch(*args, **kwargs)
        with key.off():
            call = resolve_causal_bias(SdpaCall.bind(args, kwargs))
            if isinstance(call.attn_mask, CausalBias):
                return dispatch(*args, **kwargs)
            return marked_sdpa(call, scope.config)

    CausalBias._dispatch = staticmethod(caught)  # type: ignore[method-assign]


__all__ = [
    "can_catch_attention",
    "catch_attention",
    "in_force",
    "leave_attention",
    "scope_in_force",
    "set_up_key",
    "suspend_attention",
]
