"""How the lines of the benchmarks' plots look."""

from __future__ import annotations

# Okabe and Ito's colours, apart for colour-blind eyes; markers and dashes tell the same.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
