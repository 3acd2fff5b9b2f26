"""How a model's attention calls are caught: its modules' forwards say that they run.

The class of a module is replaced by a subclass made on the fly, so ``isinstance``, ``state_dict``
keys, hooks, signatures, pickling and ``generate`` stay as they were. A traced forward enters a
function mode: Dynamo traces through it, so a compiled graph holds marker operators and no trace of
the mode itself. An eager one turns a dispatch key on (`dispatch`), as each operation would make a
detour through the mode.
"""

from __future__ import annotations

import functools
import threading
from abc import ABCMeta
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode

from .causal_bias import resolve_causal_bias
from .dispatch import (
    can_catch_attention,
    catch_attention,
    in_force,
    leave_attention,
    set_up_key,
)
from .passes import (
    MULTIHEAD_TARGETS,
    POSITIONAL,
    SDPA_TARGETS,
    TORCH_SDPA,
    SdpaCall,
    is_dtensor,
    is_watched,
    marked_multihead,
    marked_sdpa,
    refuse_multihead,
)

CONFIG_ATTRIBUTE = "_unisparse_config"
# True where only a function mode catches all attention of an eager forward.
MODE_ATTRIBUTE = "_unisparse_mode"
# Stands in the classes made here, not in classes derived from them.
MADE_HERE = "_unisparse_made_here"
SDPA_OPERATORS = SDPA_TARGETS[1:]
UNFLATTEN = torch.Tensor.unflatten
HANDLED = (*MULTIHEAD_TARGETS.values(), UNFLATTEN)


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
        if func is TORCH_SDPA or func in SDPA_OPERATORS:
            kwargs = kwargs or {}
            query = args[0] if args else kwargs.get("query")
            if isinstance(query, torch.Tensor) and query.is_nested:
                # Torch's own kernels for it stand in front of any operator.
                return func(*args, **kwargs)
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if _is_array(kwargs.get("scale")):
                args, kwargs = _scaled_before(args, kwargs)
            if not isinstance(mask, CausalBias) and not is_dtensor(query):
                # As it came: whatever a trace reads here is compared at every compiled call.
                return torch.ops.unisparse.sdpa(*args, **kwargs, config=self.config)
            call = resolve_causal_bias(SdpaCall.bind(args, kwargs))
            if not isinstance(call.attn_mask, CausalBias):
                return marked_sdpa(call, self.config)
            return func(*args, **kwargs)
        # Every operation of an eager model comes through here: the common case goes first.
        if func not in HANDLED:
            return func(*args) if kwargs is None else func(*args, **kwargs)
        kwargs = kwargs or {}
        if func is UNFLATTEN:
            # Dynamo cannot trace the method through a function mode, the function it can.
            return torch.unflatten(*args, **kwargs)
        elif refuse_multihead(func, args, kwargs) is None:
            return marked_multihead(func.__name__, *args, **kwargs, config=self.config)
        return func(*args, **kwargs)


def _is_array(scale: Any) -> bool:
    """Whether a scale is a tensor or a scalar of NumPy's, which a trace takes for a tensor."""
    return isinstance(scale, torch.Tensor) or type(scale).__module__ == "numpy"


def _scaled_before(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a call without its scale, which the operator takes as a number alone.

    While a graph is traced nobody knows the number: the query is multiplied by it instead.
    """
    bound = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
    scale = bound.pop("scale")
    if not torch.compiler.is_compiling():
        return (), {**bound, "scale": float(scale)}
    scale = torch.as_tensor(scale).detach()
    return (), {**bound, "query": bound["query"] * scale, "scale": 1.0}


def intercept(module: nn.Module, config: str) -> None:
    """Makes attention inside ``module``'s forward sparse; again only changes the settings."""
    module.__dict__[CONFIG_ATTRIBUTE] = config
    # Its fused kernels compute attention themselves.
    module.__dict__[MODE_ATTRIBUTE] = any(
        isinstance(inner, nn.MultiheadAttention) for inner in module.modules()
    )
    if not isinstance(module, _Intercepted):
        module.__class__ = _subclass(type(module))


def release(module: nn.Module) -> None:
    """Undoes `intercept`."""
    base = type(module).__bases__[-1]
    # What made a class of its own out of ours (fully_shard) keeps it: without settings it is plain.
    if _subclasses.get(base) is type(module):
        module.__class__ = base
    module.__dict__.pop(CONFIG_ATTRIBUTE, None)
    module.__dict__.pop(MODE_ATTRIBUTE, None)


def is_intercepted(module: nn.Module) -> bool:
    """Whether `intercept` was called on ``module`` (or on what it was copied from)."""
    return settings_of(module) is not None


def settings_of(module: nn.Module) -> str | None:
    """What `intercept` was called with; ``None`` where it was not."""
    return module.__dict__.get(CONFIG_ATTRIBUTE) if isinstance(module, _Intercepted) else None


def run_sparse(config: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls ``function``; attention calls inside become the marker operator with these settings."""
    if torch.compiler.is_compiling():
        with SparseAttentionMode(config):
            return function(*args, **kwargs)
    if not can_catch_attention():
        with leave_attention(), SparseAttentionMode(config):
            return function(*args, **kwargs)
    with catch_attention(config):
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
    """Mark of the subclasses made here, in front of the class that each stands for.

    Hooks of the user's classes that run when a class is made do not run for these: such a hook may
    want arguments, and a registry would take ours for one of the user's.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if MADE_HERE not in cls.__dict__:
            super().__init_subclass__(**kwargs)


_subclasses: dict[type[nn.Module], type[nn.Module]] = {}
_making = threading.Lock()


def _subclass(cls: type[nn.Module]) -> type[nn.Module]:
    """The intercepted subclass of a class, the same one every time."""
    with _making:
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
        if torch.compiler.is_compiling():
            with SparseAttentionMode(config):
                # Dynamo cannot trace ``cls.forward`` of a class that a library allows in graphs.
                return super(subclass, self).forward(*args, **kwargs)
        if self.__dict__.get(MODE_ATTRIBUTE) or not can_catch_attention():
            with leave_attention(), SparseAttentionMode(config):
                return super(subclass, self).forward(*args, **kwargs)
        with catch_attention(config):
            return super(subclass, self).forward(*args, **kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (cls,), self.__getstate__()

    namespace = {
        MADE_HERE: True,
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    set_up_key()
    # Past what a metaclass of the user does when a class is made.
    metaclass: Any = type(cls)
    make: Any = ABCMeta.__new__ if issubclass(metaclass, ABCMeta) else type.__new__
    subclass: Any = make(metaclass, cls.__name__, (_Intercepted, cls), namespace)
    return subclass


def _is_in_force(config: str) -> bool:
    """Whether eager calls are caught with these settings already."""
    if torch.compiler.is_compiling():
        return False
    depth = torch._C._len_torch_function_stack()
    if depth == 0:
        return in_force.config == config
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
    "config_in_force",
    "fuse_split_layers",
    "intercept",
    "is_intercepted",
    "is_seen_here",
    "original_module",
    "release",
    "run_sparse",
    "settings_of",
    "split_fused_layers",
]
