"""The function mode that catches attention calls where they are traced, or where others watch.

Dynamo traces through it: a compiled graph holds marker operators and no trace of the mode itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..passes.attend import (
    MULTIHEAD_TARGETS,
    count_outcome,
    marked_multihead,
    marked_sdpa,
    refuse_multihead,
)
from ..passes.calls import (
    POSITIONAL,
    SDPA_TARGETS,
    TORCH_SDPA,
    SdpaCall,
    is_dtensor,
    own_function,
)
from .causal_bias import resolve_causal_bias

SDPA_OPERATORS = SDPA_TARGETS[1:]
UNFLATTEN = torch.Tensor.unflatten
# Dynamo takes the type of it in a traced function, not the operator.
INVOKE_SUBGRAPH = type(torch.ops.higher_order.invoke_subgraph)
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
        if not torch.compiler.is_compiling():
            func = own_function(func)
        # Every operation of an eager model comes through here: the common case goes first.
        if func not in HANDLED:
            if isinstance(func, HigherOrderOperator):
                args, kwargs = _catching_bodies(func, (args, kwargs or {}), self.config)
                return func(*args, **kwargs)
            return func(*args) if kwargs is None else func(*args, **kwargs)
        kwargs = kwargs or {}
        if func is UNFLATTEN:
            # Dynamo cannot trace the method through a function mode, the function it can.
            return torch.unflatten(*args, **kwargs)
        reason = refuse_multihead(func, args, kwargs)
        if reason is None:
            return marked_multihead(func.__name__, *args, **kwargs, config=self.config)
        if not torch.compiler.is_compiling():
            count_outcome(reason)
        return func(*args, **kwargs)


def _catching_bodies(operator: HigherOrderOperator, arguments: Any, config: str) -> Any:
    """The arguments of a higher-order operator, which runs its bodies without the mode."""
    if isinstance(operator, INVOKE_SUBGRAPH):
        (body, *operands), kwargs = arguments
        # Dynamo takes a function there that it did not make itself.
        return (_run_caught, config, body, *operands), kwargs
    return tree_map(lambda value: _catching(value, config), arguments)


def _catching(body: Any, config: str) -> Any:
    """A body whose attention calls become the marker; what is no body as it is."""
    if isinstance(body, functools.partial):
        # What scan makes of its function, and looks into.
        bound = {name: _catching(value, config) for name, value in body.keywords.items()}
        return functools.partial(body.func, *body.args, **bound)
    return functools.partial(_run_caught, config, body) if callable(body) else body


def _run_caught(config: str, body: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with SparseAttentionMode(config):
        return body(*args, **kwargs)


def _is_array(scale: Any) -> bool:
    """Whether a scale is a tensor or a scalar of NumPy's, which a trace takes for a tensor."""
    return isinstance(scale, torch.Tensor) or type(scale).__module__ == "numpy"


def _scaled_before(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a call without its scale, which the operator takes only as a number.

    While a graph is traced nobody knows the number: the query is multiplied by it instead.
    """
    bound = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
    scale = bound.pop("scale")
    if not torch.compiler.is_compiling():
        return (), {**bound, "scale": float(scale)}
    scale = torch.as_tensor(scale).detach()
    return (), {**bound, "query": bound["query"] * scale, "scale": 1.0}
