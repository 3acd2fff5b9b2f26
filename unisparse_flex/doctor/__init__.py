"""What this machine can run, what is missing and its fix: ``unisparse-flex doctor``."""

from .backends import CXX_COMPILERS, default_device
from .examination import Examination, examine
from .finding import Finding, Status

__all__ = [
    "CXX_COMPILERS",
    "Examination",
    "Finding",
    "Status",
    "default_device",
    "examine",
]
