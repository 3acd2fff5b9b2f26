"""Dense or sparse, by which kernel, and why: safety, then cost."""

from .attention_proof import attention_failure, needs_proof, prove_attention
from .call_forecast import CallForecast, forecast_call
from .cost_forecast import (
    MOST_KEPT,
    CallShape,
    break_even_length,
    break_even_length_at,
    call_shape,
    forecast,
    forecast_at,
)
from .device_facts import PUBLISHED, DeviceFacts, facts_of
from .device_rates import PLAIN, RATE_NAMES, RATES, DeviceRates, is_speed
from .flex_support import (
    FLASH_CAPABILITY,
    device_obstacle,
    flash_obstacle,
    flex_backend,
    is_flash_installed,
    reads_tensors,
    supports_head_dim,
)
from .found_rates import (
    USUAL_DTYPES,
    device_name,
    estimates,
    find_rates,
    hardware_name,
    keep_rates,
)
from .outcome_text import say_reasons
from .refusals import (
    DenseReason,
    flex_lowers,
    flex_supports,
    lacks_kernel_for_mask,
    needs_grad,
    refuse,
    refuse_sharding,
)

__all__ = [
    "FLASH_CAPABILITY",
    "MOST_KEPT",
    "PLAIN",
    "PUBLISHED",
    "RATES",
    "RATE_NAMES",
    "USUAL_DTYPES",
    "CallForecast",
    "CallShape",
    "DenseReason",
    "DeviceFacts",
    "DeviceRates",
    "attention_failure",
    "break_even_length",
    "break_even_length_at",
    "call_shape",
    "device_name",
    "device_obstacle",
    "estimates",
    "facts_of",
    "find_rates",
    "flash_obstacle",
    "flex_backend",
    "flex_lowers",
    "flex_supports",
    "forecast",
    "forecast_at",
    "forecast_call",
    "hardware_name",
    "is_flash_installed",
    "is_speed",
    "keep_rates",
    "lacks_kernel_for_mask",
    "needs_grad",
    "needs_proof",
    "prove_attention",
    "reads_tensors",
    "refuse",
    "refuse_sharding",
    "say_reasons",
    "supports_head_dim",
]
