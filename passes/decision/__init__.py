"""Dense or sparse, by which kernel, and why: safety, then cost."""

from .call_forecast import CallForecast, forecast_call
from .cost_forecast import CallShape, call_shape, forecast, forecast_at
from .device_rates import (
    PLAIN,
    RATE_NAMES,
    RATES,
    DeviceRates,
    device_name,
    find_rates,
    is_speed,
)
from .flex_support import (
    FLASH_CAPABILITY,
    flash_obstacle,
    flex_backend,
    is_flash_installed,
    supports_head_dim,
)
from .refusals import DenseReason, flex_lowers, needs_grad, refuse, refuse_sharding

__all__ = [
    "FLASH_CAPABILITY",
    "PLAIN",
    "RATES",
    "RATE_NAMES",
    "CallForecast",
    "CallShape",
    "DenseReason",
    "DeviceRates",
    "call_shape",
    "device_name",
    "find_rates",
    "flash_obstacle",
    "flex_backend",
    "flex_lowers",
    "forecast",
    "forecast_at",
    "forecast_call",
    "is_flash_installed",
    "is_speed",
    "needs_grad",
    "refuse",
    "refuse_sharding",
    "supports_head_dim",
]
