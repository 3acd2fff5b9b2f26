"""Keys in the pages of a cache: their summaries, a selection from them, the pages of its blocks."""

from .decode import DecodeSelector, choose_units, estimate_masses, keep_units
from .paged_keys import PagedKeys
from .pinned import MOST_LOGITS, PROMPT_ROWS, pin_prompt, pin_units, weigh_units
from .rows import choose_rows, pin_rows, summarize_rows
from .select import paged_obstacle, select_from_pages
from .summaries import PageSummaries, UnitSummaries, mean_group, units_share
from .tables import PageTables, name_pages

__all__ = [
    "MOST_LOGITS",
    "PROMPT_ROWS",
    "DecodeSelector",
    "PageSummaries",
    "PageTables",
    "PagedKeys",
    "UnitSummaries",
    "choose_rows",
    "choose_units",
    "estimate_masses",
    "keep_units",
    "mean_group",
    "name_pages",
    "paged_obstacle",
    "pin_prompt",
    "pin_rows",
    "pin_units",
    "select_from_pages",
    "summarize_rows",
    "units_share",
    "weigh_units",
]
