"""What an attention call is: its arguments, its settings, its place in a graph."""

from .aliases import FRESH, is_changed_between, mutated_origins, origins, writers
from .config import (
    BACKENDS,
    NAMED_SELECTORS,
    SparseConfig,
    decode_selector,
    read_selector,
)
from .nodes import operation, recorded, recorded_value
from .own_functions import own_function
from .sdpa import POSITIONAL, SDPA_TARGETS, TORCH_SDPA, SdpaCall, is_sdpa, is_symbolic
from .sharding import (
    PER_HEAD,
    HeadShard,
    is_dtensor,
    is_sharded,
    is_sharded_alike,
    run_on_shards,
    shard_selector,
    shards_tokens,
    splits_group,
)
from .tracing import is_tracing

__all__ = [
    "BACKENDS",
    "FRESH",
    "NAMED_SELECTORS",
    "PER_HEAD",
    "POSITIONAL",
    "SDPA_TARGETS",
    "TORCH_SDPA",
    "HeadShard",
    "SdpaCall",
    "SparseConfig",
    "decode_selector",
    "is_changed_between",
    "is_dtensor",
    "is_sdpa",
    "is_sharded",
    "is_sharded_alike",
    "is_symbolic",
    "is_tracing",
    "mutated_origins",
    "operation",
    "origins",
    "own_function",
    "read_selector",
    "recorded",
    "recorded_value",
    "run_on_shards",
    "shard_selector",
    "shards_tokens",
    "splits_group",
    "writers",
]
