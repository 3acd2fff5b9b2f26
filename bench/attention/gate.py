"""What must be right before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from unisparse_flex import attention

from ..calls import (
    GATE_DENSITY,
    TOLERANCE,
    Case,
    choose_top_k,
    create_selector,
    exact_output,
    force_density,
    relative_error,
)
from ..record import guarded

LENGTH, KEPT = 1000, 0.6
# FlashAttention-4 is timed and so checked only at whole blocks.
WHOLE_BLOCKS = {"flash": 1024}


def check_shape(
    shape: str, length: int, device: str, selectors: Sequence[str], backends: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Rows of one shape: attention over forced blocks, whole calls, and what is selected.

    Outputs are compared with float64 masked SDPA over the same blocks, the blocks that the kernels
    select with those that the reference selects on the CPU in float32.
    """
    on_gpu = device == "cuda"
    case = Case(shape, length, device, torch.bfloat16 if on_gpu else torch.float32)
    for backend in backends if on_gpu else ():
        own = Case(shape, WHOLE_BLOCKS.get(backend, length), device, case.dtype)
        row = _row(own, "forced", backend)
        guarded(row, "attention", partial(_check_forced, row, own, backend))
        yield _judged(row)
    for name in selectors:
        row = _row(case, name, "whole")
        guarded(row, "attention", partial(_check_whole, row, case, name))
        if on_gpu:
            guarded(row, "blocks", partial(_compare_blocks, row, case, name))
        yield _judged(row)


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The gate in a few numbers, for the head of the file."""
    errors = [row["relative_error"] for row in rows if "relative_error" in row]
    return {
        "passed": bool(rows) and all(row["passed"] for row in rows),
        "largest_relative_error": max(errors, default=None),
        "differing_blocks": sum(row.get("differing_blocks", 0) for row in rows),
        "compared_blocks": sum(row.get("compared_blocks", 0) for row in rows),
    }


def _row(case: Case, selector: str, backend: str) -> dict[str, Any]:
    return {
        "stage": "gate",
        "shape": case.shape,
        "tokens": case.tokens,
        "selector": selector,
        "backend": backend,
        "tolerance": TOLERANCE[case.dtype],
    }


def _judged(row: dict[str, Any]) -> dict[str, Any]:
    error = row.get("relative_error", float("inf"))
    return row | {"passed": error <= row["tolerance"] and "errors" not in row}


def _check_forced(row: dict[str, Any], case: Case, backend: str) -> None:
    forced = force_density(case.heads.query, case.tokens, GATE_DENSITY, case.device)
    output = case.attend(backend, forced.block_lists())
    row["relative_error"] = relative_error(output, exact_output(case, forced))


def _check_whole(row: dict[str, Any], case: Case, name: str) -> None:
    query, key, value = case.inputs
    selector = create_selector(name, choose_top_k(case.geometry.num_q_blocks, KEPT).count)
    selection = selector.select(query, key, is_causal=True)
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "selector": selector}
    output = attention(query, key, value, **options)
    row["density_measured"] = selection.density()
    row["relative_error"] = relative_error(output, exact_output(case, selection))


def _compare_blocks(row: dict[str, Any], case: Case, name: str) -> None:
    query, key, _ = case.inputs
    top_k = choose_top_k(case.geometry.num_q_blocks, KEPT).count
    differing = compared = 0
    for selector in (create_selector(name), create_selector(name, top_k)):
        kept = selector.select(query, key, is_causal=True).keep.cpu()
        reference = selector.select(query.float().cpu(), key.float().cpu(), is_causal=True)
        differing += int((kept != reference.keep).sum())
        compared += int(reference.visible.expand_as(kept).sum())
    row |= {"differing_blocks": differing, "compared_blocks": compared}
