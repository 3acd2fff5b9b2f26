"""The selectors: one file and one line here for each."""

from .base import Selector
from .unisparse import UniSparse

__all__ = ["Selector", "UniSparse"]
