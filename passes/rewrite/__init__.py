"""Graphs rewritten: attention calls found and replaced, inside torch.compile too."""

from .graph import rewrite_sdpa
from .inductor import SparseAttentionPass, install
from .report import RewriteReport

__all__ = [
    "RewriteReport",
    "SparseAttentionPass",
    "install",
    "rewrite_sdpa",
]
