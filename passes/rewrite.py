"""`rewrite_sdpa`: attention calls of an FX graph become sparse ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from .config import SparseConfig
from .decision import Reason, refuse
from .marker import lowered_sdpa
from .multihead import (
    MULTIHEAD_TARGETS,
    lowered_multihead,
    marked_multihead,
    refuse_multihead,
)
from .report import RewriteReport
from .sdpa import SdpaCall, is_sdpa

logger = logging.getLogger(__name__)

MARKER_TARGETS: frozenset[Callable[..., Any]] = frozenset(
    {torch.ops.unisparse.sdpa, torch.ops.unisparse.sdpa.default}
)


def rewrite_sdpa(
    graph: fx.Graph | fx.GraphModule | torch.export.ExportedProgram,
    config: SparseConfig | None,
    *,
    lower: bool = False,
) -> RewriteReport:
    """Rewrites the attention calls of a graph in place.

    Works on what Dynamo, `torch.fx.symbolic_trace` and `torch.export` produce, keyword and
    positional calls alike. A call whose shapes are recorded and that must stay dense is left as
    it is, with its reason in the report; one whose lengths are unknown decides when it runs.

    Args:
        graph: An FX graph, a GraphModule (recompiled afterwards) or an ExportedProgram.
        config: Settings for plain SDPA calls; ``None`` leaves them alone. Calls of the marker
            operator carry settings of their own.
        lower: Replaces calls by the computation itself instead of the marker operator. For
            graphs that go to Inductor next and nowhere else.

    Returns:
        Which nodes were rewritten and which stay dense, with the reasons.

    Raises:
        TypeError: ``graph`` is none of the three.
    """
    if isinstance(graph, torch.export.ExportedProgram):
        return rewrite_sdpa(graph.graph_module, config, lower=lower)
    if isinstance(graph, fx.GraphModule):
        report = rewrite_sdpa(graph.graph, config, lower=lower)
        graph.recompile()
        return report
    if not isinstance(graph, fx.Graph):
        raise TypeError(
            "graph must be an fx.Graph, fx.GraphModule or ExportedProgram, "
            f"got {type(graph).__name__}; trace the module with torch.fx.symbolic_trace first"
        )
    report = RewriteReport()
    _rewrite_graph(graph, config, lower=lower, report=report, prefix="")
    if report.rewritten or report.left:
        logger.info("%s", report)
    return report


def _rewrite_graph(
    graph: fx.Graph,
    config: SparseConfig | None,
    *,
    lower: bool,
    report: RewriteReport,
    prefix: str,
) -> None:
    for node in graph.nodes:
        found = _bind(node, config)
        name = prefix + node.name
        if found is not None:
            _rewrite_node(node, *found, lower=lower, report=report, name=name)
        elif config is not None and node.target in MULTIHEAD_TARGETS.values():
            _rewrite_multihead(node, config, lower=lower, report=report, name=name)
    graph.lint()
    # Bodies of checkpointed regions, branches and loops are graphs of their own.
    children = graph.owning_module.named_children() if graph.owning_module is not None else ()
    for name, child in children:
        if isinstance(child, fx.GraphModule):
            _rewrite_graph(
                child.graph, config, lower=lower, report=report, prefix=f"{prefix}{name}."
            )
            child.recompile()


def _bind(node: fx.Node, config: SparseConfig | None) -> tuple[SdpaCall, SparseConfig] | None:
    """The attention call that a node makes, with its settings."""
    if node.op == "call_function" and node.target in MARKER_TARGETS:
        kwargs = dict(node.kwargs)
        own = SparseConfig.decode(str(kwargs.pop("config", "")))
        return SdpaCall.bind(node.args, kwargs), own
    if config is not None and is_sdpa(node):
        return SdpaCall.bind(node.args, node.kwargs), config
    return None


def _rewrite_node(
    node: fx.Node,
    call: SdpaCall,
    config: SparseConfig,
    *,
    lower: bool,
    report: RewriteReport,
    name: str,
) -> None:
    reason = _refuse_node(call, config)
    if reason is not None:
        report.left[name] = reason
        logger.debug("%s stays dense: %s", name, reason)
        return
    node.target = lowered_sdpa if lower else torch.ops.unisparse.sdpa.default
    node.args = call.positional()
    node.kwargs = {**call.keywords(), "config": config.encode()}
    report.rewritten.append(name)


def _rewrite_multihead(
    node: fx.Node, config: SparseConfig, *, lower: bool, report: RewriteReport, name: str
) -> None:
    """The attention inside is decided when the call is traced or runs: lengths are known there."""
    assert callable(node.target)
    reason = refuse_multihead(node.target, node.args, node.kwargs)
    if reason is not None:
        report.left[name] = reason
        logger.debug("%s stays dense: %s", name, reason)
        return
    node.args = (node.target.__name__, *node.args)
    node.kwargs = {**node.kwargs, "config": config.encode()}
    node.target = lowered_multihead if lower else marked_multihead
    report.rewritten.append(name)


def _refuse_node(call: SdpaCall, config: SparseConfig) -> Reason | None:
    """`refuse` on what the graph records; a call of unknown shapes decides when it runs."""
    tensors = [call.query, call.key, call.value]
    if call.attn_mask is not None:
        tensors.append(call.attn_mask)
    if any(_recorded(tensor) is None for tensor in tensors):
        return Reason.EXCLUDED if config.dense else None
    numbers = {name: _number(getattr(call, name)) for name in ("dropout_p", "scale", "is_causal")}
    return refuse(replace(call.map_tensors(_recorded), **numbers), config)


def _number(argument: Any) -> Any:
    """A scalar argument, or what tracing recorded where the graph computes it."""
    return argument.meta.get("example_value") if isinstance(argument, fx.Node) else argument


def _recorded(node: Any) -> Tensor | None:
    """The (fake) tensor that tracing recorded for a node."""
    meta = getattr(node, "meta", {})
    value = meta.get("val", meta.get("example_value"))
    return value if isinstance(value, Tensor) else None
