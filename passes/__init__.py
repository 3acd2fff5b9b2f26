"""Where in a graph: finds attention calls, proves them safe, rewrites them. Knows no models."""

from .config import SparseConfig
from .decision import Reason
from .inductor import SparseAttentionPass, install
from .marker import is_traced, is_watched, lowered_sdpa, marked_sdpa, observe_calls
from .masks import Unproved
from .multihead import MULTIHEAD_TARGETS, marked_multihead, refuse_multihead
from .predicted_call import CallPrediction, predict_call
from .report import RewriteReport
from .rewrite import rewrite_sdpa
from .sdpa import SdpaCall

__all__ = [
    "MULTIHEAD_TARGETS",
    "CallPrediction",
    "Reason",
    "RewriteReport",
    "SdpaCall",
    "SparseAttentionPass",
    "SparseConfig",
    "Unproved",
    "install",
    "is_traced",
    "is_watched",
    "lowered_sdpa",
    "marked_multihead",
    "marked_sdpa",
    "observe_calls",
    "predict_call",
    "refuse_multihead",
    "rewrite_sdpa",
]
