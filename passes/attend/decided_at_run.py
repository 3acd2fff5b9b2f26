"""`torch.ops.unisparse.sdpa_at_run`: an attention call that decides when it runs.

A graph for a range of lengths that somebody stated must hold no guard on them: neither whether the
call is long enough to be sparse nor the block grid may be fixed while it is traced. The operator
stands in it as it is, and at run time does what the call does uncompiled, through kernels compiled
for its kind. Its output lies in memory as [B, Sq, Hq, Dv].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.fx.experimental.symbolic_shapes import StrictMinMaxConstraint

from ..calls import SdpaCall, SparseConfig, is_symbolic

_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, "
    "float? scale, bool enable_gqa, bool causal_lower_right, str mask, Tensor[] mask_tensors, "
    "SymInt[] mask_numbers, str config"
)
_NAMES = tuple(field.name for field in fields(SdpaCall))
_library = torch.library.Library("unisparse", "FRAGMENT")
_library.define(f"sdpa_at_run({_SCHEMA}) -> Tensor")
_library.define(f"sdpa_at_run_backward(Tensor grad, {_SCHEMA}) -> (Tensor, Tensor, Tensor)")


def sdpa_at_run(call: SdpaCall, config: SparseConfig) -> Tensor:
    """Records the call as one node that no length is fixed for; [B, Hq, Sq, Dv]."""
    arguments = {name: getattr(call, name) for name in _NAMES}
    arguments["mask_tensors"] = list(call.mask_tensors or ())
    arguments["mask_numbers"] = list(call.mask_numbers or ())
    output: Tensor = torch.ops.unisparse.sdpa_at_run(*arguments.values(), config.encode())
    return output


def has_stated_range(call: SdpaCall, *, unknown: bool = False) -> bool:
    """Whether a length of the call is dynamic within bounds that the graph must serve.

    Those are of `torch.export.Dim` and `torch._dynamo.mark_dynamic` with ``min`` or ``max``. An
    ahead-of-time package cannot run an operator written in Python: its graph keeps what holds for
    the example.

    Args:
        call: The call, traced.
        unknown: The answer where the graph does not come from Dynamo, which knows what was stated.
    """
    lengths = (*call.query.shape[::2], *call.key.shape[::2])
    if inductor_config.cpp_wrapper or not any(is_symbolic(length) for length in lengths):
        return False
    tracing = torch._guards.TracingContext.try_get()
    contexts = [] if tracing is None else list(tracing.tensor_to_context.values())
    if not contexts:
        return unknown
    return any(
        isinstance(constraint, StrictMinMaxConstraint)
        for context in contexts
        for constraint in getattr(context, "constraint_sizes", ())
    )


def implement(run: Callable[[SdpaCall, SparseConfig], Tensor]) -> None:
    """Registers what the operator does with real tensors, once."""

    def forward(*args: Any) -> Tensor:
        call, config = _bind(args)
        with torch.no_grad():
            # The mask as it is: what was read of it is known by the tensor.
            detached = replace(call.map_tensors(torch.Tensor.detach), attn_mask=call.attn_mask)
            return _lay_out(run(detached, config))

    def backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        call, config = _bind(args)
        inputs = [t.detach().requires_grad_() for t in (call.query, call.key, call.value)]
        # Behind a dispatch mode autograd is off, whatever is enabled.
        on = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
        with on, torch.enable_grad():
            query, key, value = inputs
            output = run(replace(call, query=query, key=key, value=value), config)
        return tuple(_lay_out(found) for found in torch.autograd.grad(output, inputs, grad))

    _library.impl("sdpa_at_run", forward, "CompositeExplicitAutograd")
    _library.impl("sdpa_at_run_backward", backward, "CompositeExplicitAutograd")


def _bind(args: Sequence[Any]) -> tuple[SdpaCall, SparseConfig]:
    *values, config = args
    return SdpaCall(**dict(zip(_NAMES, values, strict=True))), SparseConfig.decode(config)


def _lay_out(output: Tensor) -> Tensor:
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _describe(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return _laid_out(query, value.shape[3])


def _describe_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(_laid_out(tensor, tensor.shape[3]) for tensor in args[:3])


def _laid_out(like: Tensor, head_dim: int) -> Tensor:
    batch, heads, length = like.shape[:3]
    return like.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    mask_tensors = inputs[_NAMES.index("mask_tensors")]
    ctx.save_for_backward(*(inputs[i] for i in ctx.tensors), *mask_tensors)
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs, saved = list(ctx.others), list(ctx.saved_tensors)
    for i in ctx.tensors:
        inputs[i] = saved.pop(0)
    inputs[_NAMES.index("mask_tensors")] = saved
    found = torch.ops.unisparse.sdpa_at_run_backward(grad, *inputs)
    return (*found, *(_nothing_like(value) for value in inputs[3:]))


def _nothing_like(value: Any) -> Any:
    """No gradient, in the structure that torch wants: lists of tensors stay lists."""
    is_list = isinstance(value, (list, tuple)) and all(isinstance(v, Tensor) for v in value)
    return [None] * len(value) if is_list else None


torch.library.register_fake("unisparse::sdpa_at_run", _describe, lib=_library)
torch.library.register_fake("unisparse::sdpa_at_run_backward", _describe_backward, lib=_library)
torch.library.register_autograd(
    "unisparse::sdpa_at_run", _differentiate, setup_context=_save, lib=_library
)
