"""torch's own functions, whatever somebody has assigned to their names since."""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodWrapperType
from typing import Any

import torch
import torch.nn.functional as F

Function = Callable[..., Any]

_OWN: tuple[tuple[Any, str, Function], ...] = tuple(
    (namespace, name, function)
    for namespace in (F, torch.functional, torch.Tensor)
    for name, function in vars(namespace).items()
    if isinstance(function, FunctionType)
)
_OWN_IDS = frozenset(id(function) for _, _, function in _OWN)
_BUILT_IN = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType)


def own_function(function: Function) -> Function:
    """What torch defined under the name that ``function`` was assigned to, or ``function`` itself.

    A function of torch's that is written in Python asks for its overrides by its own name. Where
    that name stands for a patch, a function mode is given the patch, which has run already:
    calling it would run it twice.
    """
    if id(function) in _OWN_IDS or isinstance(function, _BUILT_IN):
        return function
    for namespace, name, own in _OWN:
        if vars(namespace).get(name) is function:
            return own
    return function
