"""What a rewritten call computes: the marker operator and the ways that it is lowered."""

from .alignment import prepared_mask
from .cpu_tiles import widen_tiles
from .decided_at_run import has_stated_range
from .listed_units import attend_listed
from .marker import (
    computed_sdpa,
    is_traced,
    is_watched,
    lowered_sdpa,
    marked_sdpa,
    observe_calls,
    observer_in_force,
    run_compiled,
)
from .mask_contents import read_call
from .multihead import MULTIHEAD_TARGETS, lowered_multihead, marked_multihead, refuse_multihead
from .outcomes import Outcomes, are_counted, count_outcome, count_outcomes
from .selected_attention import attend_selected
from .shared_tokens import context_sdpa, register_context
from .sparse_attention import (
    apply_autocast,
    call_geometry,
    keeps_window,
    logit_scale,
    select,
)

__all__ = [
    "MULTIHEAD_TARGETS",
    "Outcomes",
    "apply_autocast",
    "are_counted",
    "attend_listed",
    "attend_selected",
    "call_geometry",
    "computed_sdpa",
    "context_sdpa",
    "count_outcome",
    "count_outcomes",
    "has_stated_range",
    "is_traced",
    "is_watched",
    "keeps_window",
    "logit_scale",
    "lowered_multihead",
    "lowered_sdpa",
    "marked_multihead",
    "marked_sdpa",
    "observe_calls",
    "observer_in_force",
    "prepared_mask",
    "read_call",
    "refuse_multihead",
    "register_context",
    "run_compiled",
    "select",
    "widen_tiles",
]
