"""The calls that `explain` saw as a table that fits a terminal."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence

from ..block_masks import Selector
from ..counted import counted
from ..passes.decision import CallForecast
from ..shares import keep_part
from ..wrapping import wrap
from .attention_record import AttentionRecord
from .gains import predicted_ms, prefill_ms

# A table never needs more; wider terminals have room for more of a layer's name.
COLUMNS, MOST_COLUMNS = 80, 118
LEAST_NAME = 12
CUT = "..."
HEADER = (
    *("layer", "queries", "keys", "heads", "runs", "density"),
    *("dense", "sparse", "from", "why"),
)
# Above two of them and one: what the cost model says is no measurement.
PREDICTED, SPARSE_FROM = "predicted ms", "sparse"
FROM_NOTE = (
    "sparse from: the fewest keys (tokens) from which such a call, of whole blocks, is predicted "
    "to be faster sparse and to drop a tenth of them, at {expected}{none}{density}"
)
EXPECTED, ASSUMED = (
    "the density that is expected of the selector",
    "half of the blocks, which is assumed of a selector without a cost",
)
# In place of a length, and what that means, whether a call is faster at the density it has or not.
AT_NO_LENGTH = "-"
AT_NO_LENGTH_NOTE = " (-: at no length, at that density)"
REST_RUN = "in one uncompiled run (a first run is slower)"
ALL_LOGITS = (
    ", with the logits of every position: explain(model, input_ids, logits_to_keep=1) computes the "
    "last alone, as generate does"
)
LEFT = ("layer", "runs")
# The place of a layer in its stack.
INDEX = re.compile(r"(?<![^.])(\d+)(?![^.])")
# Lines of a table that leave the verdict before it out of sight.
MANY_LINES = 16


def terminal_columns() -> int:
    """Columns of the terminal, at least 80; 80 where there is none."""
    found = shutil.get_terminal_size((COLUMNS, 24)).columns
    return min(max(found, COLUMNS), MOST_COLUMNS)


def format_table(
    calls: Sequence[AttentionRecord],
    columns: int,
    rest_ms: float | None = None,
    all_logits: bool = False,
) -> list[str]:
    """See `Explanation.table`; its lines."""
    if not calls:
        return []
    reasons = count_reasons(calls)
    rows = collapse([_cells(call, reasons) for call in calls])
    if all(call.q_len == call.kv_len for call in calls):
        left_out = HEADER.index("queries")
        header = [*HEADER[:left_out], *HEADER[left_out + 1 :]]
        rows = [[*row[:left_out], *row[left_out + 1 :]] for row in rows]
    else:
        header = list(HEADER)
    least = [len(SPARSE_FROM) if name == "from" else len(name) for name in header]
    widths = [max(size, *(len(row[i]) for row in rows)) for i, size in enumerate(least)]
    gap, names = _fit_names([row[0] for row in rows], columns - sum(widths[1:]), len(widths) - 1)
    rows = [[name, *row[1:]] for name, row in zip(names, rows, strict=True)]
    widths[0] = max(map(len, (header[0], *names)))
    left = [name in LEFT for name in header]
    until_sparse = header.index("sparse") + 1
    predicted = sum(widths[:until_sparse]) + (until_sparse - 1) * len(gap)
    lines = [
        f"{PREDICTED:>{predicted}}{gap}{SPARSE_FROM:>{widths[header.index('from')]}}",
        _line(header, widths, left, gap),
        gap.join("-" * width for width in widths),
        *(_line(row, widths, left, gap) for row in rows),
    ]
    for number, (reason, count) in enumerate(reasons.items(), 1):
        of = f" ({count} calls)" if count > 1 else ""
        lines.append(wrap(f"[{number}] {reason}{of}", columns, indent=4))
    if known := sum(call.prediction is not None for call in calls):
        lines.append(wrap(describe_sparse_from(calls), columns))
        dense, decided = map(three_digits, predicted_ms(calls))
        of = "" if known == len(calls) else f" for {counted(known, 'call')}"
        lines.append(
            wrap(
                f"predicted{of}, attention only: {decided} ms as decided, {dense} ms all dense",
                columns,
            )
        )
    if (whole := prefill_ms(calls, rest_ms)) is not None and rest_ms is not None:
        dense, decided, rest = map(three_digits, (*whole, rest_ms))
        lines.append(
            wrap(
                f"predicted, whole prefill: {decided} ms as decided, {dense} ms all dense; the "
                f"rest of the model took {rest} ms here, {REST_RUN}"
                f"{ALL_LOGITS if all_logits else ''}",
                columns,
            )
        )
    return lines


def describe_sparse_from(calls: Sequence[AttentionRecord]) -> str:
    """What "sparse from" means, and at which density the milliseconds are."""
    selectors = [call.config.selector for call in calls if call.config is not None]
    assumed = bool(selectors) and all(type(each).cost is Selector.cost for each in selectors)
    found = [call.density is not None for call in calls if call.prediction is not None]
    density = ", and so are the milliseconds"
    if any(found):
        where = "" if all(found) else " where a call runs sparse"
        density = f"; milliseconds, those of each call, are at the one found here{where}"
    forecasts = (call.prediction for call in calls)
    return FROM_NOTE.format(
        none=AT_NO_LENGTH_NOTE if any(p and p.break_even is None for p in forecasts) else "",
        expected=ASSUMED if assumed else EXPECTED,
        density=density,
    )


def say_sparse_from(found: CallForecast) -> str:
    """The fewest keys from which sparse is predicted to pay for a call; a dash for no length."""
    return AT_NO_LENGTH if found.break_even is None else str(found.break_even)


def collapse(rows: Sequence[list[str]]) -> list[list[str]]:
    """One row for each run of layers that say the same, such as ``model.layers.0-29.self_attn``.

    Args:
        rows: Cells, the layer's name first; layers of a run follow one another in their stack.
    """
    found: list[list[str]] = []
    # First and last index of the run in the last row.
    first = last = -1
    start = ""
    for name, *cells in rows:
        parts = INDEX.split(name, maxsplit=1)
        index = int(parts[1]) if len(parts) == 3 else -1
        pattern = "\0".join(parts[::2])
        if (
            found
            and index >= 0
            and (index, pattern) == (last + 1, start)
            and cells == found[-1][1:]
        ):
            last = index
            found[-1][0] = f"{parts[0]}{first}-{last}{parts[2]}"
            continue
        found.append([name, *cells])
        first, last, start = index, index, pattern
    return found


def short_names(names: Sequence[str], width: int) -> list[str] | None:
    """Names of layers without the first and last parts that all share, where they are too long.

    Args:
        names: Dotted names.
        width: Most characters of one.

    Returns:
        The names; ``None`` where they are too long even so.
    """
    if max(map(len, names)) <= width:
        return list(names)
    parts = [name.split(".") for name in names]
    head = _shared(parts)
    tail = _shared([each[head:][::-1] for each in parts])
    for last in (0, tail) if tail else (0,):
        for first in range(1, head + 1):
            end = CUT if last else ""
            short = [CUT + ".".join(each[first : len(each) - last]) + end for each in parts]
            if max(map(len, short)) <= width:
                return short
    return None


def three_digits(milliseconds: float) -> str:
    """Milliseconds with at least three digits."""
    return f"{milliseconds:.{max(0, 3 - len(str(int(milliseconds))))}f}"


def count_reasons(calls: Sequence[AttentionRecord]) -> dict[str, int]:
    """Why calls stay dense, in the order of the footnotes, and how many for each reason."""
    return Counter(str(call.reason) for call in calls if call.reason is not None)


def _cells(call: AttentionRecord, reasons: Mapping[str, int]) -> list[str]:
    lengths = [str(n) if n else "" for n in (call.q_len, call.kv_len)]
    density = "" if call.density is None else f"{keep_part(call.density, decimals=3):.3f}"
    predicted = ["", "", ""]
    if (p := call.prediction) is not None:
        sparse = "" if call.is_excluded else three_digits(p.sparse_ms)
        predicted = [three_digits(p.dense_ms), sparse, say_sparse_from(p)]
    why = "" if call.reason is None else f"[{[*reasons].index(str(call.reason)) + 1}]"
    return [call.layer, *lengths, call.heads, call.decision, density, *predicted, why]


def _fit_names(names: Sequence[str], room: int, gaps: int) -> tuple[str, list[str]]:
    """What stands between columns, and the names in what that leaves of the room."""
    for gap in ("  ", " "):
        short = short_names(names, room - gaps * len(gap))
        if short is not None:
            return gap, short
    width = max(room - gaps, LEAST_NAME)
    return " ", [n if len(n) <= width else CUT + n[len(CUT) - width :] for n in names]


def _shared(names: Sequence[Sequence[str]]) -> int:
    """How many parts all names begin with; one part at least is left of each."""
    least = min(map(len, names)) - 1
    return next((i for i in range(least) if len({name[i] for name in names}) > 1), least)


def _line(cells: Sequence[str], widths: Sequence[int], left: Sequence[bool], gap: str) -> str:
    return gap.join(
        cell.ljust(width) if to_left else cell.rjust(width)
        for cell, width, to_left in zip(cells, widths, left, strict=True)
    ).rstrip()
