"""The selectors: one file and one line here for each."""

from .base import Selector
from .flexprefill import FlexPrefill
from .minference import MInference
from .unisparse import UniSparse

__all__ = ["FlexPrefill", "MInference", "Selector", "UniSparse"]
