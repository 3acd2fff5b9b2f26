"""Block-sparse prefill inside vLLM: a plug-in of its attention backends.

``pip install "unisparse-flex[vllm]"`` and ``vllm serve MODEL --attention-backend CUSTOM`` is all.
vLLM calls `register` in each of its processes; settings are ``additional_config["unisparse"]``,
see `Options`.
"""

from .counters import Counts, read_counts, reset_counts
from .options import KEY, PARENTS, Options
from .reasons import Reason
from .registration import ENTRY_POINT, GROUP, register
from .versions import TESTED, is_tested

__all__ = [
    "ENTRY_POINT",
    "GROUP",
    "KEY",
    "PARENTS",
    "TESTED",
    "Counts",
    "Options",
    "Reason",
    "is_tested",
    "read_counts",
    "register",
    "reset_counts",
]
