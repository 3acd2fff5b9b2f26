"""Dynamic block-sparse attention for any PyTorch model, compiled through FlexAttention.

model = unisparse_flex.optimize(model)
model = torch.compile(model)
"""

try:
    from .block_masks import (
        DEFAULT_SELECTOR,
        BlockSelection,
        DenseSpan,
        FlashPrefill,
        FlexPrefill,
        MInference,
        Oracle,
        PatchOrder,
        Selector,
        StreamingLLM,
        UniSparse,
        XAttention,
        create_block_mask,
    )
    from .calibrating import calibrate
    from .calibration import Calibration
    from .context import sparse
    from .functional import attention
    from .optimization import is_optimized, optimize, restore
    from .passes.rewrite import install as _install
    from .patches import patch_attention
    from .reports import AttentionRecord, Explanation, explain, record_attention
except Exception as error:
    from .private_names import explain_failed_import

    raise explain_failed_import(error) from error

# Once, before any thread compiles: settings travel in the graphs, so it serves every model.
_install()

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_SELECTOR",
    "AttentionRecord",
    "BlockSelection",
    "Calibration",
    "DenseSpan",
    "Explanation",
    "FlashPrefill",
    "FlexPrefill",
    "MInference",
    "Oracle",
    "PatchOrder",
    "Selector",
    "StreamingLLM",
    "UniSparse",
    "XAttention",
    "attention",
    "calibrate",
    "create_block_mask",
    "explain",
    "is_optimized",
    "optimize",
    "patch_attention",
    "record_attention",
    "restore",
    "sparse",
]
