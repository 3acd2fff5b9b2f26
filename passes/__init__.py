"""Where in a graph: finds attention calls, proves them safe, rewrites them. Knows no models."""

from .attend import observe_calls
from .calls import SparseConfig
from .decision import DenseReason
from .rewrite import RewriteReport, SparseAttentionPass, rewrite_sdpa

__all__ = [
    "DenseReason",
    "RewriteReport",
    "SparseAttentionPass",
    "SparseConfig",
    "observe_calls",
    "rewrite_sdpa",
]
