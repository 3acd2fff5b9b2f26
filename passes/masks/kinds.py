"""What a proved mask is, in words."""

from __future__ import annotations

from ...block_masks.masks import (
    KV,
    TRUE,
    Affine,
    Bool,
    Compare,
    FloorDiv,
    Load,
    Or,
    Q,
    conjuncts,
    coordinates,
    offset_bound,
    replace_atoms,
    variable,
)


def describe_mask(expr: Bool) -> str:
    """Names of the parts that a mask is a conjunction of: ``"causal, key padding"``."""
    parts = conjuncts(expr)
    if not parts:
        return "everything"
    bounds = [offset for part in parts if (offset := offset_bound(part, KV, Q)) is not None]
    names: dict[str, None] = {}
    for part in parts:
        names[_describe(part, bounds)] = None
    # In one order, whatever the order of a model's own conjunction.
    last = ("causal by position", "window by position")
    return ", ".join(sorted(names, key=lambda name: (name != "causal", name in last)))


def _describe(part: Bool, offsets: list[Affine]) -> str:
    names = coordinates(part)
    if offset_bound(part, KV, Q) is not None:
        return "causal"
    bound = offset_bound(part, Q, KV)
    if bound is not None:
        widths = [offset + bound + 1 for offset in offsets]
        plain = next((width.const for width in widths if not width.terms), None)
        return "sliding window" if plain is None else f"sliding window {plain}"
    if "q" not in names:
        return "key padding"
    if "kv" not in names:
        return "query padding"
    if isinstance(part, Compare) and part.op == "==":
        return _describe_equality(part)
    if isinstance(part, Compare) and all(
        isinstance(atom, Load) or atom == KV for atom, _ in part.difference.terms
    ):
        return "window by position" if part.difference.factor(KV) < 0 else "causal by position"
    if isinstance(part, Or):
        causal = [p for p in part.parts if offset_bound(p, KV, Q) is not None]
        if causal and all("q" not in coordinates(p) for p in part.parts if p not in causal):
            return "prefix"
    return "other"


def _describe_equality(part: Compare) -> str:
    own = replace_atoms(part, lambda atom: variable(Q) if atom == KV else None)
    atoms = [atom for atom, _ in part.difference.terms]
    if own == TRUE and all(isinstance(atom, FloorDiv) for atom in atoms):
        return f"chunks of {atoms[0].divisor}"  # type: ignore[union-attr]
    return "document" if all(isinstance(atom, Load) for atom in atoms) else "other"
