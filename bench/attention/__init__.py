"""Block-sparse attention against every dense kernel."""

from .tables import (
    Result,
    Row,
    density_name,
    density_order,
    describe,
    describe_together,
    draw,
    join,
    sparse_rows,
)

__all__ = [
    "Result",
    "Row",
    "density_name",
    "density_order",
    "describe",
    "describe_together",
    "draw",
    "join",
    "sparse_rows",
]
