"""What `explain` says, with more around it: as text, as JSON and as one page of HTML."""

from .explain_report import ExplainReport, ReportedCall, report_model
from .explanation import AttentionRecord, Explanation, explain, record_attention, track_layer
from .page import render_page

__all__ = [
    "AttentionRecord",
    "ExplainReport",
    "Explanation",
    "ReportedCall",
    "explain",
    "record_attention",
    "render_page",
    "report_model",
    "track_layer",
]
