"""What this machine can run, what is missing and its fix: ``unisparse-flex doctor``."""

from .examination import Examination, examine
from .finding import Finding, Status

__all__ = ["Examination", "Finding", "Status", "examine"]
