"""How attention calls of a model are caught, whoever calls, traces or recomputes them."""

from .causal_bias import resolve_causal_bias
from .dispatch_key import leave_attention, set_up_key
from .first_forward import await_first_forward, name_reason
from .model_inputs import hint_at_tensors
from .modules import (
    CONFIG_ATTRIBUTE,
    fuse_split_layers,
    holders_of,
    intercept,
    is_intercepted,
    original_module,
    release,
    settings_of,
    split_fused_layers,
)
from .scopes import config_in_force, is_seen_here, run_sparse

__all__ = [
    "CONFIG_ATTRIBUTE",
    "await_first_forward",
    "config_in_force",
    "fuse_split_layers",
    "hint_at_tensors",
    "holders_of",
    "intercept",
    "is_intercepted",
    "is_seen_here",
    "leave_attention",
    "name_reason",
    "original_module",
    "release",
    "resolve_causal_bias",
    "run_sparse",
    "set_up_key",
    "settings_of",
    "split_fused_layers",
]
