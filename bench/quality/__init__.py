"""Quality against density of every selector, on real models and texts."""

from .models import MODELS, Subject, load
from .summary import describe_together
from .sweeps import defaults
from .tables import describe, draw
from .trials import rows_alike

__all__ = [
    "MODELS",
    "Subject",
    "defaults",
    "describe",
    "describe_together",
    "draw",
    "load",
    "rows_alike",
]
