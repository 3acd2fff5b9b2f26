"""What `explain` says, with more around it: as text, as JSON and as one page of HTML."""

from .explain_report import ExplainReport, ReportedCall, report_model
from .page import render_page

__all__ = ["ExplainReport", "ReportedCall", "render_page", "report_model"]
