"""Keys in the pages of a cache: their means, a selection from them, the pages of its blocks."""

from .means import create_means, mean_group, summarize_pages
from .paged_keys import PagedKeys
from .select import paged_obstacle, select_from_pages
from .tables import PageTables, name_pages

__all__ = [
    "PageTables",
    "PagedKeys",
    "create_means",
    "mean_group",
    "name_pages",
    "paged_obstacle",
    "select_from_pages",
    "summarize_pages",
]
