"""How a model's attention calls are caught: its modules' forwards enter a function mode.

The class of a module is replaced by a subclass made on the fly, so ``isinstance``, ``state_dict``
keys, hooks, signatures, pickling and ``generate`` stay as they were. Dynamo traces through the
mode, so a compiled graph holds marker operators and no trace of the mode itself.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import TorchFunctionMode

from .passes import (
    MULTIHEAD_TARGETS,
    SdpaCall,
    marked_multihead,
    marked_sdpa,
    refuse_multihead,
)

CONFIG_ATTRIBUTE = "_unisparse_config"
UNFLATTEN = torch.Tensor.unflatten
HANDLED = (F.scaled_dot_product_attention, *MULTIHEAD_TARGETS.values(), UNFLATTEN)


class SparseAttentionMode(TorchFunctionMode):
    """Turns attention calls into the marker operator with these settings.

    They are ``F.scaled_dot_product_attention`` and what `nn.MultiheadAttention` and the layers
    around it call, ``passes.MULTIHEAD_TARGETS``.
    """

    def __init__(self, config: str) -> None:
        super().__init__()
        self.config = config

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Passes every other function on."""
        # Every operation of an eager model comes through here: the common case goes first.
        if func not in HANDLED:
            return func(*args) if kwargs is None else func(*args, **kwargs)
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            call = resolve_causal_bias(SdpaCall.bind(args, kwargs))
            if not isinstance(call.attn_mask, CausalBias):
                return marked_sdpa(call, self.config)
        elif func is UNFLATTEN:
            # Dynamo cannot trace the method through a function mode, the function it can.
            return torch.unflatten(*args, **kwargs)
        elif refuse_multihead(func, args, kwargs) is None:
            return marked_multihead(func.__name__, *args, **kwargs, config=self.config)
        return func(*args, **kwargs)


def resolve_causal_bias(call: SdpaCall) -> SdpaCall:
    """Replaces a `CausalBias` mask by the flags that say the same.

    One made for other lengths stays as it is.
    """
    bias = call.attn_mask
    if not isinstance(bias, CausalBias) or call.is_causal:
        return call
    if (bias.seq_len_q, bias.seq_len_kv) != (call.query.shape[-2], call.key.shape[-2]):
        return call
    lower_right = bias.variant is CausalVariant.LOWER_RIGHT
    return replace(call, attn_mask=None, is_causal=True, causal_lower_right=lower_right)


def intercept(module: nn.Module, config: str) -> None:
    """Makes ``module`` run its forward under the mode; again only changes the settings."""
    module.__dict__[CONFIG_ATTRIBUTE] = config
    if not isinstance(module, _Intercepted):
        module.__class__ = _subclass(type(module))


def release(module: nn.Module) -> None:
    """Undoes `intercept`."""
    if isinstance(module, _Intercepted):
        module.__class__ = type(module).__bases__[0]
    module.__dict__.pop(CONFIG_ATTRIBUTE, None)


def is_intercepted(module: nn.Module) -> bool:
    """Whether `intercept` was called on ``module`` (or on what it was copied from)."""
    return isinstance(module, _Intercepted) and CONFIG_ATTRIBUTE in module.__dict__


def split_fused_layers(model: nn.Module) -> None:
    """Makes torch's encoder layers call their attention by itself: no mode sees the fused call."""
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            layer.activation_relu_or_gelu = 0


def fuse_split_layers(model: nn.Module) -> None:
    """Undoes `split_fused_layers`."""
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            relu = layer.activation is F.relu or isinstance(layer.activation, nn.ReLU)
            gelu = layer.activation is F.gelu or isinstance(layer.activation, nn.GELU)
            layer.activation_relu_or_gelu = 1 if relu else 2 if gelu else 0


class _Intercepted:
    """Mark of the subclasses made here."""


_subclasses: dict[type[nn.Module], type[nn.Module]] = {}


def _subclass(cls: type[nn.Module]) -> type[nn.Module]:
    """The intercepted subclass of a class, the same one every time."""
    if cls not in _subclasses:
        _subclasses[cls] = _make_subclass(cls)
    return _subclasses[cls]


def _make_subclass(cls: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        config = self.__dict__.get(CONFIG_ATTRIBUTE)
        # A module without settings was made by calling the class of an optimized one: it is plain.
        if config is None or _is_in_force(config):
            return super(subclass, self).forward(*args, **kwargs)
        with SparseAttentionMode(config):
            # Dynamo cannot trace ``cls.forward`` of a class that a library allows in graphs.
            return super(subclass, self).forward(*args, **kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (cls,), self.__getstate__()

    def fill(namespace: dict[str, Any]) -> None:
        namespace.update(
            forward=forward,
            __reduce_ex__=__reduce_ex__,
            __module__=cls.__module__,
            __qualname__=cls.__qualname__,
            __doc__=cls.__doc__,
        )

    subclass: Any = types.new_class(cls.__name__, (cls, _Intercepted), exec_body=fill)
    return subclass


def _is_in_force(config: str) -> bool:
    """Whether the innermost mode of an eager call has these settings already.

    A mode inside another costs every operation its detour once more.
    """
    depth = 0 if torch.compiler.is_compiling() else torch._C._len_torch_function_stack()
    if depth == 0:
        return False
    mode = torch._C._get_function_stack_at(depth - 1)
    return isinstance(mode, SparseAttentionMode) and mode.config == config


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    module = cls.__new__(cls)
    module.__class__ = _subclass(cls)
    return module


def original_module(model: Any) -> Any:
    """What `torch.compile` wrapped, or the model itself."""
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model


__all__ = [
    "SparseAttentionMode",
    "fuse_split_layers",
    "intercept",
    "is_intercepted",
    "original_module",
    "release",
    "resolve_causal_bias",
    "split_fused_layers",
]
