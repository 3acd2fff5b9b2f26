"""torch's own functions, whatever somebody has assigned to their names."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodWrapperType
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload

Function = Callable[..., Any]

# With its separator: torchvision and torchao lie beside it.
TORCH_FOLDER = os.path.join(os.path.dirname(torch.__file__), "")
# Each with the module that its functions are written in.
NAMESPACES: dict[Any, str] = {
    F: "torch.nn.functional",
    torch.functional: "torch.functional",
    torch.Tensor: "torch._tensor",
}
# What nobody has assigned a patch of.
BUILT_IN = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, OpOverload)


def own_function(function: Function) -> Function:
    """What torch defined under the name that ``function`` was assigned to, or ``function`` itself.

    A function of torch's that is written in Python asks for its overrides by its own name. Where
    that name stands for a patch, a function mode is given the patch, which has run already:
    calling it would run it twice.
    """
    if id(function) in _OWN_IDS or isinstance(function, BUILT_IN):
        return function
    for namespace, name, own in _OWN:
        if vars(namespace).get(name) is function:
            return own
    return function


def _is_torchs(function: Any) -> bool:
    return isinstance(function, FunctionType) and function.__code__.co_filename.startswith(
        TORCH_FOLDER
    )


def _find_own() -> Iterator[tuple[Any, str, Function]]:
    """The functions that torch wrote in Python, by where they stand."""
    patched = []
    for namespace, module in NAMESPACES.items():
        for name, function in vars(namespace).items():
            if _is_torchs(function):
                yield namespace, name, function
            elif callable(function) and _may_be_patch(function):
                patched.append((namespace, name, module))
    if not patched:
        return
    # Assigned before this module was imported: the patch holds torch's own somewhere.
    known: dict[tuple[str, str], Function] = {}
    for function in filter(_is_torchs, gc.get_objects()):
        place = function.__module__, function.__qualname__
        # What wraps a function has the names of what it wraps.
        if place not in known or hasattr(function, "__wrapped__"):
            known[place] = function
    for namespace, name, module in patched:
        prefix = f"{namespace.__name__}." if isinstance(namespace, type) else ""
        own = known.get((module, prefix + name))
        if own is not None:
            yield namespace, name, own


def _may_be_patch(value: Any) -> bool:
    """Whether a callable that is no Python function of torch's is one of somebody else's."""
    if isinstance(value, (FunctionType, partial)):
        return True
    module = getattr(value, "__module__", None) or type(value).__module__
    return module.partition(".")[0] not in {"torch", "typing", *sys.stdlib_module_names}


_OWN = tuple(_find_own())
_OWN_IDS = frozenset(id(function) for _, _, function in _OWN)
