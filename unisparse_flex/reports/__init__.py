"""What `explain` says, with more around it: as text, as JSON and as one page of HTML."""

from .attention_record import AttentionRecord, sparse_densities
from .density import LEFT_DENSE, mean_density
from .explain_report import ExplainReport, ReportedCall, find_versions, report_model
from .explain_table import MANY_LINES
from .explanation import Explanation, explain, record_attention, track_layer
from .figures import (
    DensitySeries,
    LayerBlocks,
    collect_blocks,
    draw_block_maps,
    draw_densities,
)
from .layers import index_of
from .measured_page import render_quality, render_speed
from .page import render_page
from .verdict import DIFFUSE_HERE
from .wording import name_runs, runs_of

__all__ = [
    "DIFFUSE_HERE",
    "LEFT_DENSE",
    "MANY_LINES",
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
    "find_versions",
    "index_of",
    "mean_density",
    "name_runs",
    "record_attention",
    "render_page",
    "render_quality",
    "render_speed",
    "report_model",
    "runs_of",
    "sparse_densities",
    "track_layer",
]
