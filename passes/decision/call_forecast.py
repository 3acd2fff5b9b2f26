"""The cost model's word on one attention call, for people to read."""

from __future__ import annotations

from dataclasses import dataclass

from ...block_masks.selectors import Selector
from ..calls import SdpaCall
from .cost_forecast import break_even_length, call_shape, forecast, rates_of
from .found_rates import MEASURE
from .refusals import flex_lowers


@dataclass(frozen=True, kw_only=True, slots=True)
class CallForecast:
    """The cost model's word on one call, for people to read.

    Attributes:
        dense_ms: Milliseconds of dense attention.
        sparse_ms: Milliseconds of selection and sparse attention.
        density: Kept over visible blocks: measured, or what the selector expects.
        break_even: Fewest keys from which sparse is predicted to pay for such a call, with as
            many queries if it has as many queries as keys; ``None`` where it never does.
        note: Empty, or that the device has no rates of its own, which are used, and what measures
            them.
    """

    dense_ms: float
    sparse_ms: float
    density: float
    break_even: int | None
    note: str

    @property
    def is_foreign(self) -> bool:
        """Whether the rates are another machine's, and this one's can be measured."""
        return self.note.endswith(MEASURE)


def forecast_call(
    call: SdpaCall, selector: Selector, density: float | None = None
) -> CallForecast | None:
    """Predicts a call of real tensors; ``None`` where no block-sparse kernel takes it.

    Args:
        call: The call.
        selector: Which blocks are kept.
        density: Kept over visible blocks where that was measured; the selector's own estimate by
            default.
    """
    tensors = (call.query, call.key, call.value)
    if any(tensor.dim() != 4 or 0 in tensor.shape for tensor in tensors):
        return None
    if call.query.device.type not in ("cpu", "cuda") or not flex_lowers(call):
        return None
    shape = call_shape(call)
    found = forecast(shape, selector, density)
    self_attention = shape.q_len == shape.kv_len
    return CallForecast(
        dense_ms=found.dense_seconds * 1e3,
        sparse_ms=found.sparse_seconds * 1e3,
        density=found.density,
        break_even=break_even_length(shape, selector, self_attention=self_attention),
        note=rates_of(shape, selector).remark,
    )
