"""Where in a graph: finds attention calls, proves them safe, rewrites them. Knows no models."""

from ..block_masks.selectors import validate_selector
from .config import SparseConfig, decode_selector
from .context import context_sdpa, register_context
from .decision import Reason, flex_lowers, refuse
from .inductor import SparseAttentionPass, install
from .marker import (
    is_traced,
    is_watched,
    lowered_sdpa,
    marked_sdpa,
    observe_calls,
    observer_in_force,
    run_compiled,
)
from .mask_tracing import TracedMask, trace_mask
from .masks import Unproved
from .multihead import MULTIHEAD_TARGETS, marked_multihead, refuse_multihead
from .predicted_call import CallPrediction, predict_call
from .prediction import call_shape, forecast
from .report import RewriteReport
from .rewrite import rewrite_sdpa
from .sdpa import POSITIONAL, SDPA_TARGETS, TORCH_SDPA, SdpaCall
from .selected_attention import attend_selected
from .sharding import HeadShard, is_dtensor, shard_selector
from .sparse_attention import apply_autocast, call_geometry, logit_scale, select

__all__ = [
    "MULTIHEAD_TARGETS",
    "POSITIONAL",
    "SDPA_TARGETS",
    "TORCH_SDPA",
    "CallPrediction",
    "HeadShard",
    "Reason",
    "RewriteReport",
    "SdpaCall",
    "SparseAttentionPass",
    "SparseConfig",
    "TracedMask",
    "Unproved",
    "apply_autocast",
    "attend_selected",
    "call_geometry",
    "call_shape",
    "context_sdpa",
    "decode_selector",
    "flex_lowers",
    "forecast",
    "install",
    "is_dtensor",
    "is_traced",
    "is_watched",
    "logit_scale",
    "lowered_sdpa",
    "marked_multihead",
    "marked_sdpa",
    "observe_calls",
    "observer_in_force",
    "predict_call",
    "refuse",
    "refuse_multihead",
    "register_context",
    "rewrite_sdpa",
    "run_compiled",
    "select",
    "shard_selector",
    "trace_mask",
    "validate_selector",
]
