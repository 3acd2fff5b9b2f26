"""Settings of each layer, found by running a model on a sample."""

from .run import calibrate

__all__ = [
    "calibrate",
]
