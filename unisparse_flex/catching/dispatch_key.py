"""How an eager model's attention calls are caught: by a dispatch key that only they know.

Inside `catch_attention` the key is on in this thread. Every operator falls through it at no cost
but ``aten::scaled_dot_product_attention`` and the marker, which have kernels there.

Why a key that torch reserves for its tests. These ways need no private name, and fall short:

- A wrapper assigned to ``F.scaled_dot_product_attention`` is as fast, but does not see a name that
  was imported before it, the aten operator, torch's fused layers, nor what a patch made before it
  calls; those calls would be dense without a word.
- Kernels of `torch.library` for the autograd and backend keys see all calls, but those of every
  other model in the process too, at 25 microseconds each; and with one at a backend key
  ``ExportedProgram.run_decompositions`` no longer decomposes attention.
- A function mode makes every operation slower: twice the time of a small model's decoding step.
- `torch.nn.attention.register_flash_attention_impl` exists from torch 2.14, for CUDA without masks.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from ..passes import DenseReason, SparseConfig
from ..passes.attend import computed_sdpa, count_outcome, is_watched, marked_sdpa
from ..passes.calls import SDPA_TARGETS, TORCH_SDPA, SdpaCall, is_tracing
from .causal_bias import resolve_causal_bias

logger = logging.getLogger(__name__)

KEY_NAME = "TESTING_ONLY_GenericMode"


@dataclass(slots=True)
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
    """The settings of this thread's innermost `catch_attention`: every module's forward asks.

    A thread that inherits the key inherits no settings: what torch runs there (backward) takes
    them along by itself (`carry`).
    """

    scope: Scope | None = None

    @property
    def config(self) -> str | None:
        """Those of the scope, encoded."""
        return None if self.scope is None else self.scope.config


in_force = InForce()


class _Key:
    """The dispatch key and what is registered for it."""

    def __init__(self) -> None:
        self.key: Any = torch._C._parse_dispatch_key(KEY_NAME)
        if self.key is None or torch._C._dispatch_has_backend_fallback(self.key):
            raise RuntimeError(f"the dispatch key {KEY_NAME} is missing or taken")
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

    def is_on(self) -> bool:
        """Whether this thread's calls come to the kernels."""
        return torch._C._dispatch_tls_is_dispatch_key_included(self.key)

    def switch(self, on: bool) -> None:
        """Lets this thread's calls come to the kernels, or no longer."""
        torch._C._dispatch_tls_set_dispatch_key_included(self.key, on)

    @contextmanager
    def off(self) -> Iterator[None]:
        was_on = self.is_on()
        self.switch(False)
        try:
            yield
        finally:
            self.switch(was_on)


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


class _Catching:
    """One `catch_attention`; written out, as every forward enters one."""

    __slots__ = ("_outer", "_settings", "_was_on")

    def __init__(self, config: str) -> None:
        self._settings = config

    def __enter__(self) -> None:
        assert _key is not None
        self._outer, self._was_on = in_force.scope, _key.is_on()
        in_force.scope = Scope.create(self._settings)
        _key.switch(True)

    def __exit__(self, *_: object) -> None:
        assert _key is not None
        _key.switch(self._was_on)
        in_force.scope = self._outer


def catch_attention(config: str) -> AbstractContextManager[None]:
    """Turns the attention calls of this thread into the marker operator with these settings."""
    return _Catching(config)


def leave_attention() -> AbstractContextManager[None]:
    """Inside, no outer `catch_attention` catches."""
    return nullcontext() if _key is None else _key.off()


def scope_in_force() -> Scope | None:
    """The `catch_attention` that would see an attention call of this thread."""
    return in_force.scope if _key is not None and _key.is_on() else None


def _sdpa(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.ops.aten.scaled_dot_product_attention` where the key is on."""
    assert _key is not None
    scope = in_force.scope
    # Without a context manager: decoding pays for what stands here.
    _key.switch(False)
    try:
        if scope is None:
            return TORCH_SDPA(query, *args, **kwargs)
        if query.is_nested:
            count_outcome(DenseReason.NOT_DENSE)
            return TORCH_SDPA(query, *args, **kwargs)
        if (
            type(query) is Tensor
            and query.dim() == 4
            and query.shape[2] < scope.min_queries
            and not torch._C._len_torch_dispatch_stack()
            and not is_watched()
        ):
            dense = math.isinf(scope.min_queries)
            count_outcome(DenseReason.EXCLUDED if dense else DenseReason.FEW_QUERIES)
            return TORCH_SDPA(query, *args, **kwargs)
        if torch.compiler.is_compiling():
            logger.warning("attention that a forward traces by itself stays dense")
            return TORCH_SDPA(query, *args, **kwargs)
        call = SdpaCall.bind((query, *args), kwargs)
        return computed_sdpa(call, scope.config)
    finally:
        _key.switch(True)


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
    override = CausalBias.__torch_function__

    def caught(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_caught = func in SDPA_TARGETS and not torch.compiler.is_compiling()
        scope = scope_in_force() if is_caught else None
        if scope is None:
            return override(func, types, args, kwargs)
        with key.off():
            call = resolve_causal_bias(SdpaCall.bind(args, kwargs or {}))
            if isinstance(call.attn_mask, CausalBias):
                return override(func, types, args, kwargs)
            return marked_sdpa(call, scope.config)

    replaced: Any = classmethod(caught)
    setattr(CausalBias, override.__name__, replaced)


__all__ = [
    "can_catch_attention",
    "catch_attention",
    "in_force",
    "leave_attention",
    "scope_in_force",
    "set_up_key",
]
