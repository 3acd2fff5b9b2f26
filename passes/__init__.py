"""Where in a graph: finds attention calls, proves them safe, rewrites them. Knows no models."""

from ..block_masks.selectors import validate_selector
from .config import SparseConfig, decode_selector
from .decision import Reason, flex_lowers, refuse
from .inductor import SparseAttentionPass, install
from .marker import is_traced, is_watched, lowered_sdpa, marked_sdpa, observe_calls
from .masks import Unproved
from .multihead import MULTIHEAD_TARGETS, marked_multihead, refuse_multihead
from .predicted_call import CallPrediction, predict_call
from .prediction import call_shape, forecast
from .report import RewriteReport
from .rewrite import rewrite_sdpa
from .sdpa import SdpaCall
from .sparse_attention import apply_autocast, call_geometry, select

__all__ = [
    "MULTIHEAD_TARGETS",
    "CallPrediction",
    "Reason",
    "RewriteReport",
    "SdpaCall",
    "SparseAttentionPass",
    "SparseConfig",
    "Unproved",
    "apply_autocast",
    "call_geometry",
    "call_shape",
    "decode_selector",
    "flex_lowers",
    "forecast",
    "install",
    "is_traced",
    "is_watched",
    "lowered_sdpa",
    "marked_multihead",
    "marked_sdpa",
    "observe_calls",
    "predict_call",
    "refuse",
    "refuse_multihead",
    "rewrite_sdpa",
    "select",
    "validate_selector",
]
