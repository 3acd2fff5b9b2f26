"""What `explain` says, with more around it: as text, as JSON and as one page of HTML."""

from .explain_report import ExplainReport, ReportedCall, report_model
from .explanation import AttentionRecord, Explanation, explain, record_attention, track_layer
from .figures import (
    DensitySeries,
    LayerBlocks,
    collect_blocks,
    draw_block_maps,
    draw_densities,
)
from .page import render_page

__all__ = [
    "AttentionRecord",
    "DensitySeries",
    "ExplainReport",
    "Explanation",
    "LayerBlocks",
    "ReportedCall",
    "collect_blocks",
    "draw_block_maps",
    "draw_densities",
    "explain",
    "record_attention",
    "render_page",
    "report_model",
    "track_layer",
]
