"""Dynamic block-sparse attention for any PyTorch model, compiled through FlexAttention.

model = unisparse_flex.optimize(model)
model = torch.compile(model)
"""

from typing import Any

try:
    from . import selectors
    from .block_masks import create_block_mask
    from .calibrating import calibrate
    from .calibration import Calibration
    from .functional import attention, patch_attention
    from .optimization import is_optimized, optimize, restore, temporarily_optimize
    from .passes.rewrite import install as _install
    from .reports import explain
    from .selectors import Selector, UniSparse
except Exception as error:
    from .private_names import explain_failed_import

    raise explain_failed_import(error) from error

# Once, before any thread compiles: settings travel in the graphs, so it serves every model.
_install()

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Selector",
    "UniSparse",
    "attention",
    "calibrate",
    "create_block_mask",
    "explain",
    "is_optimized",
    "optimize",
    "patch_attention",
    "restore",
    "selectors",
    "temporarily_optimize",
]

_RENAMED = {
    "sparse": "temporarily_optimize",
    **{name: f"reports.{name}" for name in ("AttentionRecord", "Explanation", "record_attention")},
    **{name: f"selectors.{name}" for name in selectors.__all__},
}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        raise AttributeError(f"unisparse_flex.{name} is unisparse_flex.{_RENAMED[name]} now")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
