"""What came of a search, in words: why layers are dense, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..calibration import Calibration
from ..counted import counted
from ..passes import DenseReason
from ..passes.decision import break_even_length, forecast, say_reasons
from ..reports import index_of, name_runs, runs_of
from ..shares import say_tenths

if TYPE_CHECKING:
    from ..block_masks import Selector
    from .search import Search

# Settings in Python, which the command writes as options.
MIN_LENGTH = "min_length=0"
# Of a target: where less is used, it is said why.
ROOM = 0.5
FEWEST_BLOCKS = f"{MIN_LENGTH} for the fewest blocks instead of the least time"


def why_dense(search: Search, found: Calibration) -> str | None:
    """Why a result leaves every layer dense, and what to do; ``None`` where some is sparse."""
    if found.sparse_layers:
        return None
    if not search.layers:
        refused: Counter[DenseReason] = Counter()
        for layer in search.all_layers.values():
            refused += layer.refused
        return f"no call could be sparse with any setting{say_reasons(refused)}"
    if any(layer.could_be_faster for layer in search.layers.values()):
        target = f"a {found.quality} of {found.target:g}"
        easier = "a larger kl" if found.quality == "kl" else "a smaller recall"
        ways = f"longer prompts, {easier}"
        if search.min_length is None:
            ways += f", or {FEWEST_BLOCKS}"
        else:
            ways = ways.replace(",", " or")
        if search.nearly_all is not None:
            kept = say_tenths(search.nearly_all)
            return f"nothing is gained, {target} keeps {kept} of the blocks; {ways}"
        tried = counted(len(search.ladder), "setting")
        return (
            f"of the {tried} tried{_say_finest(search.ladder)}, none that costs less than dense "
            f"attention reaches {target}; {ways}"
        )
    if search.min_length is not None:
        return "every setting keeps all blocks at this length; longer prompts drop some"
    return (
        "every setting is predicted to take longer than dense attention at this length; "
        f"longer prompts, or {FEWEST_BLOCKS}"
    )


def say_left_dense(search: Search, found: Calibration) -> str | None:
    """Which layers that may run sparse `optimize` leaves dense at these lengths, if any.

    It goes by the density that a selector expects, not by what was measured here.
    """
    if search.min_length is not None:
        return None
    sparse = found.sparse_layers
    left = [
        name
        for name, selector in sparse.items()
        if not any(forecast(s, selector).pays for s in search.layers[name].shapes)
    ]
    if not left:
        return None
    longest = {name: max(search.layers[name].shapes, key=lambda s: s.kv_len) for name in left}
    lengths = [
        break_even_length(s, sparse[name], self_attention=s.q_len == s.kv_len)
        for name, s in longest.items()
    ]
    known = [length for length in lengths if length is not None]
    which = f"{'that layer' if len(left) == 1 else 'these layers'} ({_name_layers(left)})"
    if len(known) < len(lengths):
        return f"optimize leaves {which} dense too at every length, unless it gets {MIN_LENGTH}"
    tokens = max(s.kv_len for s in longest.values())
    return (
        f"at {tokens} tokens optimize leaves {which} dense too; sparse from {max(known)} on, "
        f"or with {MIN_LENGTH}"
    )


def say_room_left(search: Search, found: Calibration) -> str | None:
    """Why more than half of a target is left, where layers are dense that gain nothing within it.

    What such a layer would add to a KL is taken from what was measured of it.
    """
    allowed, used = found.target, found.reached
    if found.quality == "recall":
        allowed, used = 1.0 - allowed, 1.0 - used
    if not found.sparse_layers or used >= ROOM * allowed:
        return None
    dense = [name for name in search.layers if name not in found.sparse_layers]
    stuck = [name for name in dense if _is_stuck(search, found, name, allowed - used)]
    if not stuck:
        return None
    which = "this layer stays" if len(stuck) == 1 else "these layers stay"
    return (
        f"more than half of the target is left: {which} dense ({_name_layers(stuck)}), every "
        "setting that fits costs as much as dense attention or more"
    )


def _is_stuck(search: Search, found: Calibration, name: str, room: float) -> bool:
    """Whether no setting of a dense layer both costs less and stays within what is left."""
    layer = search.layers[name]
    if not layer.could_be_faster:
        return True
    settings = [(choice,) * layer.num_units for choice in range(len(search.ladder))]
    cheaper = [each for each in settings if layer.chosen(layer.cost, each) < layer.dense_cost]
    if search.per_head or not cheaper:
        # Heads' settings have more combinations than can be ruled out.
        return False
    share = min(map(layer.share, cheaper))
    if found.quality == "recall":
        return share / sum(each.chooses for each in search.layers.values()) > room
    return search.weights is not None and search.weights[name] * share > room


def _say_finest(ladder: Sequence[Selector]) -> str:
    """The smallest threshold of the settings; empty where one of them has none."""
    thresholds = [getattr(selector, "threshold", None) for selector in ladder]
    known = [threshold for threshold in thresholds if threshold is not None]
    return f", down to threshold {min(known):g}" if len(known) == len(thresholds) else ""


def _name_layers(names: Sequence[str]) -> str:
    """Layers by their place in the stack, or by their names where some have none."""
    indices = [index_of(name) for name in names]
    known = sorted({index for index in indices if index is not None})
    return name_runs(runs_of(known), ", ") if len(known) == len(names) else ", ".join(names)
