"""Settings in force go along with what torch runs apart from a forward.

That is what a forward calls through `torch.compile`, the bodies of higher-order operators, and
what backward computes again: functions of `torch.autograd.Function`s (reentrant checkpointing,
reversible layers) and hooks on saved tensors (checkpointing that is not reentrant).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch._dynamo.eval_frame import _TorchDynamoContext
from torch._dynamo.variables.torch_function import TorchFunctionModeStackVariable
from torch._inductor.output_code import CompiledFxGraph
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks

from ..passes.attend import count_outcome
from .dispatch_key import in_force, scope_in_force
from .function_mode import SparseAttentionMode
from .scopes import config_in_force, run_sparse

HOOKS = "enter_exit_hooks"
CONFIG = "_unisparse_config"
_installing = threading.Lock()


def install() -> bool:
    """Changes torch where it runs such code; again changes nothing.

    Returns:
        Whether compiled functions are reached: without, only function modes catch all attention.
    """
    with _installing:
        return _install()


@cache
def _install() -> bool:
    _allow_modes_in_bodies()
    _carry_into_functions_of_backward()
    _carry_into_saved_tensors_hooks()
    return _carry_into_compiled_functions()


def _carry_into_compiled_functions() -> bool:
    """Lets compiled functions run in a function mode where the dispatch key catches attention.

    No graph holds what the key does. Dynamo sees a function mode, and compiles anew for it.
    """
    if HOOKS not in _TorchDynamoContext.__init__.__code__.co_names:
        return False

    def hooks(context: _TorchDynamoContext) -> list[Any]:
        found: list[Any] = context.__dict__[HOOKS]
        if _enter_mode not in found:
            found.insert(0, _enter_mode)
        return found

    def set_hooks(context: _TorchDynamoContext, value: list[Any]) -> None:
        context.__dict__[HOOKS] = value

    # In front of what each context has in its own dictionary, also those made before.
    setattr(_TorchDynamoContext, HOOKS, property(hooks, set_hooks))
    _leave_mode_in_kernels()
    return True


def _leave_mode_in_kernels() -> None:
    """Runs what Inductor compiled without the mode that it was traced and guarded with.

    Each of its calls of a library's kernel would make a detour through the mode.
    """
    run = CompiledFxGraph.__call__

    @wraps(run)
    def __call__(self: CompiledFxGraph, inputs: Any) -> Any:
        if torch._C._len_torch_function_stack() != 1:
            return run(self, inputs)
        mode = torch._C._get_function_stack_at(0)
        if not isinstance(mode, SparseAttentionMode):
            return run(self, inputs)
        torch._C._pop_torch_function_stack()
        try:
            return run(self, inputs)
        finally:
            torch._C._push_on_torch_function_stack(mode)

    setattr(CompiledFxGraph, "__call__", __call__)  # noqa: B010


def _enter_mode() -> Callable[[], object]:
    """What a context calls when its compiled function is called; returns what undoes it.

    The key stays on: `torch.compile` restores the dispatch keys after it has called what is
    returned, to what they were before.
    """
    scope = scope_in_force()
    if scope is None:
        return _nothing
    # Without context managers: every layer that is compiled by itself pays for what stands here.
    in_force.scope = None
    count_outcome(None)
    mode = SparseAttentionMode(scope.config)
    torch._C._push_on_torch_function_stack(mode)

    def leave() -> None:
        torch._C._pop_torch_function_stack()
        in_force.scope = scope

    return leave


def _nothing() -> None:
    pass


def _allow_modes_in_bodies() -> None:
    """Lets Dynamo enter function modes in bodies of higher-order operators.

    It takes that for a side effect of the body. Who enters a mode leaves it there again.
    """
    register = TorchFunctionModeStackVariable.register_mutation

    def register_mutation(cls: type[Any], tx: Any) -> None:
        if tx.output.is_root_tracer():
            register(tx)

    replaced: Any = classmethod(register_mutation)
    setattr(TorchFunctionModeStackVariable, register.__name__, replaced)


def _carry_into_functions_of_backward() -> None:
    make = BackwardCFunction.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        config = config_in_force()
        if config is not None:
            setattr(self, CONFIG, config)

    def carrying(run: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(run)
        def carried(self: Any, *args: Any) -> Any:
            config = self.__dict__.get(CONFIG)
            return run(self, *args) if config is None else run_sparse(config, run, self, *args)

        return carried

    setattr(BackwardCFunction, "__init__", __init__)  # noqa: B010
    for name in ("apply", "apply_boxed"):
        if name in vars(BackwardCFunction):
            setattr(BackwardCFunction, name, carrying(vars(BackwardCFunction)[name]))


def _carry_into_saved_tensors_hooks() -> None:
    make = saved_tensors_hooks.__init__

    @wraps(make)
    def __init__(self: Any, pack_hook: Any, unpack_hook: Callable[[Any], Any]) -> None:
        config = None if torch.compiler.is_compiling() else config_in_force()
        if config is None:
            make(self, pack_hook, unpack_hook)
            return

        @wraps(unpack_hook)
        def carried(packed: Any) -> Any:
            return run_sparse(config, unpack_hook, packed)

        make(self, pack_hook, carried)

    setattr(saved_tensors_hooks, "__init__", __init__)  # noqa: B010
