"""How a model's attention calls are caught: its modules' forwards say that they run.

The class of a module is replaced by a subclass made on the fly, so ``isinstance``, ``state_dict``
keys, hooks, signatures, pickling and ``generate`` stay as they were. A traced forward enters a
function mode (`function_mode`). An eager one turns a dispatch key on (`dispatch`), as each
operation would make a detour through the mode. What runs apart from a forward takes its settings
along (`carry`).
"""

from __future__ import annotations

import functools
import threading
import types
import weakref
from abc import ABCMeta
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import carry
from .dispatch_key import set_up_key
from .encoder_padding import fill_padding
from .first_forward import first_forward, is_awaited
from .scopes import is_in_force, run_sparse, run_under_mode

CONFIG_ATTRIBUTE = "_unisparse_config"
# True where only a function mode catches all attention of an eager forward.
MODE_ATTRIBUTE = "_unisparse_mode"
# Stands in the classes made here, not in classes derived from them.
MADE_HERE = "_unisparse_made_here"

# Modules that were intercepted, and copies of them.
_caught: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_caught_lock = threading.Lock()


def intercept(module: nn.Module, config: str) -> None:
    """Makes attention inside ``module``'s forward sparse; again only changes the settings."""
    module.__dict__[CONFIG_ATTRIBUTE] = config
    # Its fused kernels compute attention themselves.
    module.__dict__[MODE_ATTRIBUTE] = any(
        isinstance(inner, nn.MultiheadAttention) for inner in module.modules()
    )
    if not isinstance(module, _Intercepted):
        base = type(module)
        module.__class__ = _subclass(base)
        _rebind_forwards(module, base)
    _remember(module)
    own = module.__dict__.get("forward")
    if own is not None and not _is_wrapped_here(own):
        # What somebody assigned is called in place of the class's.
        wrapped = functools.partial(_run_forward, module, own)
        module.__dict__["forward"] = functools.update_wrapper(wrapped, own)


def release(module: nn.Module) -> None:
    """Undoes `intercept`."""
    own = module.__dict__.get("forward")
    if own is not None and _is_wrapped_here(own):
        module.__dict__["forward"] = own.args[1]
    made = type(module)
    base = made.__bases__[-1]
    # What made a class of its own out of ours (fully_shard) keeps it: without settings it is plain.
    if _subclasses.get(base) is made:
        module.__class__ = base
        _rebind_forwards(module, made)
    module.__dict__.pop(CONFIG_ATTRIBUTE, None)
    module.__dict__.pop(MODE_ATTRIBUTE, None)


def is_intercepted(module: nn.Module) -> bool:
    """Whether `intercept` was called on ``module`` (or on what it was copied from)."""
    return settings_of(module) is not None


def settings_of(module: nn.Module) -> str | None:
    """What `intercept` was called with; ``None`` where it was not."""
    return module.__dict__.get(CONFIG_ATTRIBUTE) if isinstance(module, _Intercepted) else None


def holders_of(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Modules with settings that hold ``model``, or some of it, and are no part of it.

    Returns:
        By module of ``model``, its holders, each in front of those that it is inside of.
    """
    inside = set(model.modules())
    with _caught_lock:
        around = [m for m in _caught if m not in inside and settings_of(m) is not None]
    held = {holder: list(holder.modules()) for holder in around}
    found: dict[nn.Module, list[nn.Module]] = {}
    # What is inside of another module has fewer modules than that one.
    for holder in sorted(around, key=lambda m: len(held[m])):
        for module in held[holder]:
            if module in inside:
                found.setdefault(module, []).append(holder)
    return found


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


def _run_forward(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A forward of ``module``, with its settings in force."""
    config = module.__dict__.get(CONFIG_ATTRIBUTE)
    # A module without settings was made by calling the class of an optimized one: it is plain.
    if config is None or is_in_force(config):
        return forward(*args, **kwargs)
    if torch.compiler.is_compiling():
        return run_sparse(config, forward, *args, **kwargs)
    run = run_under_mode if module.__dict__.get(MODE_ATTRIBUTE) else run_sparse
    if is_awaited(module):
        with first_forward(module):
            return run(config, forward, *args, **kwargs)
    return run(config, forward, *args, **kwargs)


def _is_wrapped_here(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func is _run_forward


def _rebind_forwards(module: nn.Module, before: type[nn.Module]) -> None:
    """Binds what ``module`` keeps of its forward under other names to its class of now.

    Hooks that replace a forward keep the one before (accelerate's ``_old_forward``) to call it, or
    to put it back.
    """
    for name, kept in module.__dict__.items():
        if (
            isinstance(kept, types.MethodType)
            and kept.__self__ is module
            and kept.__func__ is before.forward
        ):
            module.__dict__[name] = types.MethodType(type(module).forward, module)


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
        # Dynamo cannot trace ``cls.forward`` of a class that a library allows in graphs.
        return _run_forward(self, super(subclass, self).forward, *args, **kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (cls,), self.__getstate__()

    def __prepare_scriptable__(self: nn.Module) -> nn.Module:
        if CONFIG_ATTRIBUTE not in self.__dict__:
            return self
        raise TypeError(
            "torch.jit.script must be given a model that is not optimized: its language has no "
            f"function modes, so the program would be dense; got an optimized {cls.__name__}; call "
            "restore(model) first for the dense program, or use torch.export or torch.compile"
        )

    namespace = {
        MADE_HERE: True,
        "forward": fill_padding(forward) if issubclass(cls, nn.TransformerEncoder) else forward,
        "__reduce_ex__": __reduce_ex__,
        "__prepare_scriptable__": __prepare_scriptable__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    if carry.install():
        set_up_key()
    # Past what a metaclass of the user does when a class is made.
    metaclass: Any = type(cls)
    make: Any = ABCMeta.__new__ if issubclass(metaclass, ABCMeta) else type.__new__
    subclass: Any = make(metaclass, cls.__name__, (_Intercepted, cls), namespace)
    _wrap_forward_again(subclass, cls)
    return subclass


def _wrap_forward_again(subclass: type[nn.Module], cls: type[nn.Module]) -> None:
    """Runs the class hook that wrapped the forward of ``cls``, where one did, for ``subclass``.

    Such a wrapper may work on only the outermost class: the layers of transformers checkpoint
    where ``type(self).forward`` is the wrapper itself.
    """
    # The code's name: `functools.wraps` copies the name of the wrapped function.
    code = getattr(cls.forward, "__code__", None)
    made_in, hook, _ = getattr(code, "co_qualname", "").partition(".__init_subclass__.")
    for base in cls.__mro__ if hook else ():
        if base.__qualname__ == made_in and "__init_subclass__" in vars(base):
            vars(base)["__init_subclass__"].__get__(None, subclass)()
            return


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    module = cls.__new__(cls)
    module.__class__ = _subclass(cls)
    _remember(module)
    return module


def _remember(module: nn.Module) -> None:
    with _caught_lock:
        _caught.add(module)


def original_module(model: Any) -> Any:
    """What `torch.compile` wrapped, or the model itself."""
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model


__all__ = [
    "fuse_split_layers",
    "holders_of",
    "intercept",
    "is_intercepted",
    "original_module",
    "release",
    "settings_of",
    "split_fused_layers",
]
