"""`rewrite_sdpa`: attention calls of an FX graph become sparse ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..attend import (
    MULTIHEAD_TARGETS,
    call_geometry,
    has_stated_range,
    keeps_window,
    lowered_multihead,
    lowered_sdpa,
    marked_multihead,
    prepared_mask,
    refuse_multihead,
)
from ..calls import (
    TORCH_SDPA,
    SdpaCall,
    SparseConfig,
    is_sdpa,
    recorded,
    recorded_value,
)
from ..decision import DenseReason, refuse
from ..masks import MaskCache, ProvedMask, Unproved
from .repeat_kv import erase_unused, recover_gqa
from .report import RewriteReport

logger = logging.getLogger(__name__)

MARKER_TARGETS: frozenset[Callable[..., Any]] = frozenset(
    {torch.ops.unisparse.sdpa, torch.ops.unisparse.sdpa.default}
)
# What Inductor makes loops of, asking more outputs of the flex operator than its CPU kernel has.
LOOPED = ("map_impl", "scan", "associative_scan")
# What settings ask for, whatever the mask.
KEPT_DENSE = (DenseReason.EXCLUDED, DenseReason.SHORT)
LOWERED: frozenset[Callable[..., Any]] = frozenset({lowered_sdpa, lowered_multihead})


class PreparedMasks:
    """What is made of the masks of one graph, each once for the calls that share it."""

    # Where kernels read it.
    DEVICE = "cuda"

    def __init__(self) -> None:
        self._nodes: dict[tuple[Any, ...], fx.Node] = {}

    def give(self, node: fx.Node, call: SdpaCall) -> None:
        """Hands it to the rewritten ``node`` of ``call``."""
        query, key = recorded(call.query), recorded(call.key)
        if query is None or key is None or query.device.type != self.DEVICE:
            return
        shapes = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (query, key)]
        flags = [(n, v) for n, v in node.kwargs.items() if not n.startswith("mask_")]
        same = (
            *shapes,
            *map(str, flags),
            call.is_causal,
            call.attn_mask,
            *(call.mask_tensors or ()),
            *(call.mask_numbers or ()),
        )
        if same not in self._nodes:
            with node.graph.inserting_before(node):
                self._nodes[same] = node.graph.call_function(
                    prepared_mask, node.args, dict(node.kwargs)
                )
        node.kwargs = {**node.kwargs, "prepared": self._nodes[same]}


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
    body: str = "",
) -> None:
    masks, prepared = MaskCache(), PreparedMasks()
    for node in graph.nodes:
        found = _bind(node, config)
        name = prefix + node.name
        if found is not None:
            _rewrite_node(
                node, *found, masks=masks, prepared=prepared, lower=lower, report=report, name=name
            )
        elif config is not None and node.target in MULTIHEAD_TARGETS.values():
            _rewrite_multihead(node, config, lower=lower, report=report, name=name)
        if body and node.target in LOWERED:
            node.kwargs = {**node.kwargs, "body": body}
    masks.erase_unused()
    graph.lint()
    # Bodies of checkpointed regions, branches and loops are graphs of their own.
    children = graph.owning_module.named_children() if graph.owning_module is not None else ()
    for name, child in children:
        if isinstance(child, fx.GraphModule):
            _rewrite_graph(
                child.graph,
                config,
                lower=lower,
                report=report,
                prefix=f"{prefix}{name}.",
                body="loop" if body == "loop" or _is_looped(graph, name) else "body",
            )
            child.recompile()


def _is_looped(graph: fx.Graph, name: str) -> bool:
    """Whether a submodule is the body of one of `LOOPED`."""
    users = (
        user
        for node in graph.nodes
        if node.op == "get_attr" and node.target == name
        for user in node.users
    )
    return any(getattr(user.target, "__name__", "") in LOOPED for user in users)


def _bind(node: fx.Node, config: SparseConfig | None) -> tuple[SdpaCall, SparseConfig] | None:
    """The attention call that a node makes, with its settings."""
    if node.op == "call_function" and node.target in MARKER_TARGETS:
        kwargs = dict(node.kwargs)
        own = SparseConfig.decode(str(kwargs.pop("config", "")))
        kwargs.pop("prepared", None)
        return SdpaCall.bind(node.args, kwargs), own
    if config is not None and is_sdpa(node):
        return SdpaCall.bind(node.args, node.kwargs), config
    return None


def _rewrite_node(
    node: fx.Node,
    call: SdpaCall,
    config: SparseConfig,
    *,
    masks: MaskCache,
    prepared: PreparedMasks,
    lower: bool,
    report: RewriteReport,
    name: str,
) -> None:
    if config.context is not None:
        # Ranks decide together when it runs: this one knows only some of the tokens.
        report.rewritten.append(name)
        return
    if not config.dense and _decides_at_run(call):
        _write_call(node, call, config, lower=lower)
        report.rewritten.append(name)
        return
    call, proved, reason = _settle(call, config, masks)
    is_flagged = reason is not None and lower and _is_flagged(call, config, proved)
    if isinstance(proved, ProvedMask) and (reason is None or is_flagged):
        call = masks.use(proved, call)
    if reason is not None:
        report.left[name] = reason
        logger.debug("%s stays dense: %s", name, reason)
        if is_flagged:
            # PyTorch's fastest kernels take no mask tensor, but this flag.
            node.target, node.args = TORCH_SDPA, call.positional()
            node.kwargs = {"scale": call.scale, "enable_gqa": call.enable_gqa}
            report.flagged.append(name)
        return
    if isinstance(proved, Unproved):
        report.unproved[name] = proved
        logger.debug("%s keeps its mask as a tensor: %s", name, proved)
    elif proved is not None:
        report.masks[name] = proved.kind
        if keeps_window(call_geometry(_as_recorded(call), config)):
            report.windows.append(name)
    if recorded(call.query) is not None:
        call.map_tensors(recorded).with_constants()
    repeated = [call.key, call.value]
    call, saved = recover_gqa(node, call)
    if call.key is not repeated[0]:
        report.ungrouped[name] = saved
    already = node.kwargs.get("prepared")
    _write_call(node, call, config, lower=lower)
    if already:
        # Whoever called the marker operator made it.
        node.kwargs = {**node.kwargs, "prepared": already}
    elif lower and (call.mask or call.attn_mask is not None) and name not in report.windows:
        prepared.give(node, call)
    if name in report.ungrouped:
        erase_unused(repeated)
    report.rewritten.append(name)


def _settle(
    call: SdpaCall, config: SparseConfig, masks: MaskCache
) -> tuple[SdpaCall, ProvedMask | Unproved | None, DenseReason | None]:
    """The call under what its mask is proved to be, that, and why it stays dense if it does."""
    # Whether it is slower is asked once the mask is known: a formula has faster kernels.
    reason = _refuse_node(call, replace(config, min_length=config.min_length or 0))
    proved: ProvedMask | Unproved | None = None
    masked = isinstance(call.attn_mask, fx.Node) and not call.causal
    if masked and (reason is None or _depends_on_mask(call, config, reason)):
        shape = _shape(call)
        # Nothing is read, and so guarded, for a call that stays dense.
        proved = masks.lift(call.attn_mask, shape, may_read=reason not in KEPT_DENSE)
        if shape is not None and isinstance(proved, ProvedMask):
            call = proved.bind(call, q_len=shape[2], kv_len=shape[3])
        reason = _refuse_node(call, config)
    elif reason is None and config.min_length is None:
        reason = _refuse_node(call, config)
    return call, proved, reason


def _depends_on_mask(call: SdpaCall, config: SparseConfig, reason: DenseReason) -> bool:
    """Whether a call that is refused might not be, or be faster, were its mask a flag.

    Not a step of decoding.
    """
    if reason is DenseReason.SELECTOR:
        return True
    if reason not in KEPT_DENSE or config.strict or not _is_square(call) or _decides_at_run(call):
        return False
    any_call = replace(config, dense=False, min_length=0, min_queries=1)
    return _refuse_node(call, any_call) in (None, DenseReason.SELECTOR)


def settings_in(graph: fx.Graph) -> frozenset[str]:
    """The settings that markers of ``graph`` carry, encoded."""
    markers = (node for node in graph.nodes if node.target in MARKER_TARGETS)
    return frozenset(str(node.kwargs.get("config", "")) for node in markers)


def may_decode(graph: fx.Graph) -> bool:
    """Whether markers of ``graph`` may stand for a step of one query."""
    bound = (_bind(node, None) for node in graph.nodes)
    return any(found is not None and not _is_prompt(found[0]) for found in bound)


def guard_given(graph: fx.Graph) -> RewriteReport | None:
    """Guards what the masks of markers rely on of the tensors that ``graph`` is given.

    `rewrite_sdpa` does so too: this is for graphs that a cache may have in its stead.

    Returns:
        Which markers are to be rewritten and which stay dense; ``None`` where that is not known of
        some, or the graph is a step of decoding.
    """
    report, masks, all_known = RewriteReport(), MaskCache(), not _has_bodies(graph)
    for node in graph.nodes:
        call, config = _bind(node, None) or (None, None)
        if call is None or config is None:
            continue
        reason = DenseReason.EXCLUDED if config.dense else None
        masked = isinstance(call.attn_mask, fx.Node)
        asked = config.context is None and not config.dense and not _decides_at_run(call)
        shape = _shape(call)
        known = shape is not None and all(isinstance(size, int) for size in shape)
        all_known = all_known and (config.dense or (asked and known and _is_prompt(call)))
        # Lengths that are asked become guards.
        if asked and (masked or known):
            call, proved, reason = _settle(call, config, masks)
            used = reason is None or _is_flagged(call, config, proved)
            if isinstance(proved, ProvedMask) and used:
                masks.guard(proved)
        if reason is None:
            report.rewritten.append(node.name)
        else:
            report.left[node.name] = reason
    return report if all_known else None


def _is_prompt(call: SdpaCall) -> bool:
    shape = _shape(call)
    return shape is not None and isinstance(shape[2], int) and shape[2] > 1


def _has_bodies(graph: fx.Graph) -> bool:
    children = graph.owning_module.children() if graph.owning_module is not None else ()
    return any(isinstance(child, fx.GraphModule) for child in children)


def _is_flagged(call: SdpaCall, config: SparseConfig, proved: ProvedMask | Unproved | None) -> bool:
    """Whether a call that stays dense is better off with SDPA's flag than with its mask."""
    return not config.strict and isinstance(proved, ProvedMask) and _needs_no_mask(call)


def _needs_no_mask(call: SdpaCall) -> bool:
    """Whether SDPA's own flag says all of a mask that was proved, in square calls."""
    return _is_square(call) and not (call.mask or call.causal_lower_right)


def _is_square(call: SdpaCall) -> bool:
    """Whether there are as many queries as keys, at every length."""
    shape = _shape(call)
    return shape is not None and statically_known_true(shape[2] == shape[3])


def _write_call(node: fx.Node, call: SdpaCall, config: SparseConfig, *, lower: bool) -> None:
    node.target = lowered_sdpa if lower else torch.ops.unisparse.sdpa.default
    node.args = call.positional()
    node.kwargs = {**call.keywords(), "config": config.encode()}


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


def _decides_at_run(call: SdpaCall) -> bool:
    """Whether a guard on the call's lengths would deny a range that somebody stated."""
    if any(recorded(tensor) is None for tensor in (call.query, call.key, call.value)):
        return False
    return has_stated_range(_as_recorded(call))


def _refuse_node(call: SdpaCall, config: SparseConfig) -> DenseReason | None:
    """`refuse` on what the graph records; a call of unknown shapes decides when it runs."""
    tensors = [call.query, call.key, call.value]
    if call.attn_mask is not None:
        tensors.append(call.attn_mask)
    if any(recorded(tensor) is None for tensor in tensors):
        return DenseReason.EXCLUDED if config.dense else None
    return refuse(_as_recorded(call), config)


def _as_recorded(call: SdpaCall) -> SdpaCall:
    """The call with what tracing recorded in place of the graph's nodes."""
    names = ("dropout_p", "scale", "is_causal", "causal_lower_right")
    numbers = {name: _number(getattr(call, name)) for name in names}
    mask_numbers = [_number(number) for number in call.mask_numbers or ()]
    return replace(call.map_tensors(recorded), mask_numbers=mask_numbers, **numbers)


def _shape(call: SdpaCall) -> tuple[Any, ...] | None:
    """[B, Hq, Sq, Skv] of a call in a graph, where that is recorded."""
    query, key = recorded(call.query), recorded(call.key)
    if query is None or key is None:
        return None
    return (*query.shape[:3], key.shape[2])


def _number(argument: Any) -> Any:
    """A scalar argument, or what tracing recorded where the graph computes it."""
    return recorded_value(argument) if isinstance(argument, fx.Node) else argument
