"""What the engine says once at its start: what runs sparse, and what does not and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ...counted import counted
from .layer_state import LayerState
from .options import Options
from .reasons import Reason


def describe(
    states: Sequence[LayerState], options: Options, parent: str, refused: Reason | None
) -> str:
    """One report of an engine's layers on this rank, several lines.

    Args:
        states: The layers of one group of caches, bound.
        options: The settings.
        parent: The backend that computes everything else.
        refused: Why nothing of the engine runs sparse.
    """
    if refused is not None:
        return f"unisparse: everything stays with {parent}: {refused}"
    sparse = [state for state in states if state.selector is not None]
    layers = counted(len(states), "layer")
    lines = [f"unisparse: prefill of {len(sparse)} of {layers} sparse over {parent}"]
    for reason, count in Counter(s.reason for s in states if s.reason is not None).items():
        lines.append(f"  {counted(count, 'layer', 'stay')} with {parent}: {reason}")
    for selector, count in Counter(s.selector for s in sparse if s.selector).items():
        lines.append(f"  {counted(count, 'layer')}: {selector.text}")
    if not sparse:
        return "\n".join(lines)
    which = (
        f"of at least {options.min_length} keys"
        if options.min_length is not None
        else "for which the cost model predicts a gain"
    )
    lines.append(f"  rows of a prompt {which}; {parent} computes all other rows, in one call")
    for decode, count in Counter(state.decode for state in sparse).items():
        if decode is not None:
            layers = counted(count, "layer")
            lines.append(
                f"  decoding of {layers} sparse, units of {decode.unit} keys: {decode.text}"
            )
        elif options.decode is not None:
            lines.append(f"  {counted(count, 'layer', 'decode')} densely: {Reason.DECODE_PAGE}")
    view, summaries = sparse[0].view, sparse[0].summaries
    assert view is not None
    assert summaries is not None
    keys = view.pages.numel() * view.pages.element_size()
    taken = summaries.nbytes
    lines.append(
        f"  pages of {view.pages.shape[2]} keys, read in place; their summaries take "
        f"{len(sparse) * taken / 2**20:.1f} MiB, {taken / keys / 2:.2%} of the cache"
    )
    for copies, count in Counter(s.copies_keys for s in sparse).items():
        if copies is not None:
            layers = counted(count, "layer", "need")
            lines.append(f"  {layers} copies of a request's keys for selection: {copies}")
    return "\n".join(lines)
