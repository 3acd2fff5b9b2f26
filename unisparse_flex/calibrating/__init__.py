"""Settings of each layer, found by running a model on a sample."""

from .run import COARSEST, Calibrated, calibrate, calibrate_or_say_why

__all__ = [
    "COARSEST",
    "Calibrated",
    "calibrate",
    "calibrate_or_say_why",
]
