"""Other ways to make the call of `entries.check_optimize`: each gives what the call itself gives.

That is in gradients too, and where attention was patched, checkpointed, stands in the body of a
higher-order operator, or in a program that was exported for a range of lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils.checkpoint import checkpoint

from unisparse_flex import optimize

from .cases import Case
from .entries import OneCall, outcome, overlaps
from .judge import same

SDPA: Callable[..., Tensor] = F.scaled_dot_product_attention


class Checkpointed(nn.Module):
    """The call as a function that backward computes again."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, **options)

        out: Tensor = checkpoint(attend, query, key, value, use_reentrant=self.reentrant)
        return out


class InBranch(nn.Module):
    """The call in both branches of a condition on a tensor."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, **options)

        taken = torch.ones((), dtype=torch.bool)
        out: Tensor = torch.cond(taken, attend, attend, (query, key, value))
        return out


class Named(nn.Module):
    """The call with arguments that `torch.export` knows by name."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )


def check_patched(case: Case) -> str:
    """Somebody's SDPA that doubles the queries: as the call with doubled queries."""
    case, arguments = _plain(case)
    doubled = {**arguments, "query": 2 * arguments["query"]}

    def twice(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        return SDPA(2 * query, *rest, **options)

    want = outcome(_optimized(OneCall(), case), doubled)
    with mock.patch.object(F, "scaled_dot_product_attention", twice):
        found = outcome(_optimized(OneCall(), case), arguments)
    return _compare(found, want, case)


def check_checkpointed(case: Case) -> str:
    """Output and gradients of the call where backward computes it again."""
    case, arguments = _plain(case)

    def run(model: nn.Module) -> Any:
        leaves = {
            name: value.detach().requires_grad_() if name in ("query", "key", "value") else value
            for name, value in arguments.items()
        }
        output = outcome(_optimized(model, case), leaves)
        if isinstance(output, Exception):
            return output
        output.float().sum().backward()
        grads = [leaves[name].grad for name in ("query", "key", "value")]
        return torch.cat([t.detach().flatten() for t in (output, *grads) if t is not None])

    return _compare(run(Checkpointed(bool(case.seed % 2))), run(OneCall()), case)


def check_branch(case: Case) -> str:
    """The call in the body of a higher-order operator."""
    case, arguments = _plain(replace(case, sharing="none"))
    torch._dynamo.reset()
    if isinstance(outcome(InBranch(), arguments), Exception):
        return "left out: torch.cond does not take it"
    found = outcome(_optimized(InBranch(), case), arguments)
    return _compare(found, outcome(_optimized(OneCall(), case), arguments), case)


def check_exported(case: Case) -> str:
    """A program exported for a range of lengths, at the lengths of the case."""
    case, arguments = _plain(case)
    # Of a length of 1 or less torch makes a constant.
    lengths = {n: Dim(f"s{n}", min=2, max=4096) for n in (case.q_len, case.kv_len) if n > 1}
    shapes: dict[str, Any] = dict.fromkeys(arguments)
    for name, length in (("query", case.q_len), ("key", case.kv_len), ("value", case.kv_len)):
        shapes[name] = {2: lengths.get(length, Dim.STATIC)}
    mask = arguments["attn_mask"]
    if mask is not None:
        first = 4 - mask.dim()
        sizes = {2 - first: case.q_len, 3 - first: case.kv_len}
        shapes["attn_mask"] = {
            at: lengths.get(n, Dim.STATIC)
            for at, n in sizes.items()
            if at >= 0 and mask.shape[at] == n
        }
    try:
        export(Named(), (), arguments, dynamic_shapes=shapes)
    except Exception:
        return "left out: the plain model is not exported"
    program = export(_optimized(Named(), case), (), arguments, dynamic_shapes=shapes).module()
    want = outcome(_optimized(Named(), case), arguments)
    return _compare(outcome(program, arguments), want, case)


WAYS: dict[str, Callable[[Case], str]] = {
    "patched": check_patched,
    "checkpointed": check_checkpointed,
    "branch": check_branch,
    "exported": check_exported,
}


def _plain(case: Case) -> tuple[Case, dict[str, Any]]:
    """The case as SDPA takes it, without what is wrong with it, and its arguments."""
    case = replace(case, causal_lower_right=False, fault=None)
    arguments = case.arguments()
    arguments.pop("causal_lower_right")
    return case, arguments


def _optimized(model: nn.Module, case: Case) -> nn.Module:
    return optimize(model, case.selector, min_length=0)


def _compare(found: Any, want: Any, case: Case) -> str:
    if overlaps(case.arguments()):
        return "left out: undefined in SDPA"
    assert type(found) is type(want), (found, want)
    if isinstance(want, Exception):
        return "raises as SDPA does"
    assert same(found, want)
    return "computed"
