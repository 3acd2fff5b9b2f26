"""`DeferredMask`: an attention mask that is a formula where it can be, else a tensor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..passes.calls import SdpaCall
from ..passes.masks import ProvedMask, Unproved, trace_mask

logger = logging.getLogger(__name__)


class DeferredMask(Tensor):
    """A bool mask [B, 1, Sq, Skv] that is not computed before something reads it.

    A model may hand it on as it is, or do to it what it would do to any tensor: the first operation
    computes it. `bind` puts it into an attention call as a formula, and computes nothing.

    Args:
        compute: Makes the mask from ``numbers``.
        numbers: Integers that change from call to call; see `trace_mask`.
        shape: [B, 1, Sq, Skv].
        device: Where it is computed.
        padding: What the model was given: [B, keys], 0 or False for padding; ``None`` for none.
    """

    padding: Tensor | None
    _compute: Callable[..., Tensor]
    _numbers: tuple[int, ...]
    _tensor: Tensor | None
    _proved: ProvedMask | Unproved | None

    @staticmethod
    def __new__(
        cls,
        compute: Callable[..., Tensor],
        numbers: Sequence[int],
        *,
        shape: Sequence[int],
        device: Any,
        padding: Tensor | None = None,
    ) -> DeferredMask:
        """A tensor without storage."""
        mask: DeferredMask = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=torch.bool, device=device
        )
        mask._compute, mask._numbers = compute, tuple(numbers)
        mask._tensor = mask._proved = None
        mask.padding = padding
        return mask

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs every operation on the computed mask."""
        args, kwargs = tree_map(
            lambda value: value.compute() if isinstance(value, DeferredMask) else value,
            (args, dict(kwargs or {})),
        )
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeferredMask(shape={list(self.shape)}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """What a compiled graph takes in its place: the computed mask."""
        self.compute()
        return ["_tensor"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], _: None, outer_size: Sequence[int], outer_stride: Sequence[int]
    ) -> DeferredMask:
        """Undoes `__tensor_flatten__`."""
        tensor = inner["_tensor"]
        mask = DeferredMask(lambda: tensor, (), shape=outer_size, device=tensor.device)
        mask._tensor = tensor
        return mask

    def compute(self) -> Tensor:
        """The mask as a plain tensor, computed once."""
        if self._tensor is None:
            self._tensor = self._compute(*self._numbers)
        return self._tensor

    def bind(self, call: SdpaCall) -> SdpaCall:
        """``call`` with this mask: as flags or as a formula, or computed where neither is proved.

        Args:
            call: query [B, Hq, Sq, D] and key [B, Hkv, Skv, D] and no mask.
        """
        batch, heads, q_len = call.query.shape[:3]
        kv_len = call.key.shape[2]
        if (batch, q_len, kv_len) != (self.shape[0], self.shape[2], self.shape[3]):
            return replace(call, attn_mask=self.compute())
        if self._proved is None:
            self._proved = trace_mask(self._compute, self._numbers, (batch, heads, q_len, kv_len))
            said = self._proved if isinstance(self._proved, Unproved) else self._proved.kind
            logger.debug("mask %s: %s", list(self.shape), said)
        if isinstance(self._proved, Unproved):
            return replace(call, attn_mask=self.compute())
        return self._proved.bind(call, q_len=q_len, kv_len=kv_len)
