"""One cell of the coverage table: a family run in a mode, counted and measured."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tests.api.capture import MARKERS
from tests.api.reference import rmse
from unisparse_flex import optimize
from unisparse_flex.passes import DenseReason, RewriteReport, SparseConfig, rewrite_sdpa
from unisparse_flex.passes.attend.multihead import MULTIHEAD_TARGETS, refuse_multihead
from unisparse_flex.passes.calls.sdpa import SdpaCall
from unisparse_flex.reports import record_attention

from .family import EVERYTHING, SELECTOR, Family
from .modes import MODES, Inputs, Mode, Run, forward, without_cache
from .replay import recorded, replayed

# What bears no mark in a graph: multi-head calls that are refused; of the rest none may be left.
UNMARKED: set[Any] = {
    *MULTIHEAD_TARGETS.values(),
    F.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
}


def _reason(node: fx.Node) -> DenseReason:
    """Why a node bears no mark."""
    target: Any = node.target
    if target not in MULTIHEAD_TARGETS.values():
        return DenseReason.NOT_OPTIMIZED
    return refuse_multihead(target, node.args, node.kwargs) or DenseReason.NOT_OPTIMIZED


def _named_nodes(gm: fx.GraphModule) -> Iterator[tuple[str, fx.Node]]:
    """The nodes of a graph and of its inner graphs, named as a report names them."""
    for path, module in gm.named_modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                yield f"{path}.{node.name}" if path else node.name, node


def _mask(name: str, node: fx.Node, report: RewriteReport) -> str:
    """What the report, or else the rewritten node, says of its mask."""
    if name in report.unproved:
        return f"tensor: {report.unproved[name]}"
    if name in report.masks:
        return report.masks[name] + (" (kept whole)" if name in report.windows else "")
    own = {key: value for key, value in node.kwargs.items() if key != "config"}
    call = SdpaCall.bind(node.args, own)
    assert call.attn_mask is None
    if call.causal_lower_right:
        return "causal_lower_right"
    return "is_causal" if call.is_causal else "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What was found.

    Attributes:
        sparse: Attention calls (of a compiled or exported model: nodes) that are sparse.
        dense: How many stay dense, for each reason.
        graphs: Graphs captured, 0 where nothing was traced.
        windows: Sparse nodes or calls whose sliding window is kept whole: nothing is left out.
        masks: What the masks of sparse nodes were proved to be, and of how many.
        error: Relative error against the float64 oracle over the same blocks.
        plain_error: That of the same blocks computed plainly in float32.
        full_error: With ``top_p=1``, relative error against the untouched model.
        change: How far the output is from the untouched model's.
    """

    sparse: int
    dense: dict[DenseReason, int]
    graphs: int
    windows: int
    masks: dict[str, int]
    error: float
    plain_error: float
    full_error: float
    change: float


@dataclass
class Traced:
    """A backend that applies the pass to graphs, runs them uncompiled, and holds them."""

    graphs: list[fx.GraphModule] = field(default_factory=list)
    reports: list[RewriteReport] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, _: list[Tensor] | None = None) -> Callable[..., Any]:
        self.graphs.append(gm)
        self.reports.append(rewrite_sdpa(gm, None))
        return lambda *args: gm(*args)

    def decisions(self) -> tuple[int, dict[DenseReason, int]]:
        """How many marked nodes the pass makes sparse, and why it leaves the others."""
        dense = sum((Counter(report.skipped) for report in self.reports), Counter[DenseReason]())
        for node in self.nodes():
            if node.target in UNMARKED:
                dense[_reason(node)] += 1
        return sum(len(report.rewritten) for report in self.reports), dict(+dense)

    def masks(self) -> dict[str, int]:
        """What the mask of each rewritten node was proved to be."""
        found: Counter[str] = Counter()
        for gm, report in zip(self.graphs, self.reports, strict=True):
            named = dict(_named_nodes(gm))
            found.update(_mask(name, named[name], report) for name in report.rewritten)
        return dict(found)

    def nodes(self) -> Iterator[fx.Node]:
        """The nodes of every graph, inner graphs included."""
        for gm in self.graphs:
            for _, node in _named_nodes(gm):
                yield node

    def keep_everything(self) -> None:
        """Makes every marked node keep every block from now on."""
        for node in self.nodes():
            if node.target in MARKERS:
                own = SparseConfig.decode(str(node.kwargs["config"]))
                config = SparseConfig(selector=EVERYTHING, min_queries=own.min_queries)
                node.kwargs = {**node.kwargs, "config": config.encode()}
        for gm in self.graphs:
            for module in gm.modules():
                if isinstance(module, fx.GraphModule):
                    module.recompile()


def in_float64(model: Any) -> Any:
    """A float64 copy."""
    exact = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation"):
        # The grouped kernel of the default takes no float64.
        exact.set_experts_implementation("eager")
    return exact


@torch.no_grad()
def compute_cell(family: Family, mode_name: str) -> Cell:
    """Runs ``family`` in a mode: optimized, untouched, and by definition."""
    mode = MODES[mode_name]
    untouched, inputs = family.create(), family.inputs()
    optimized = optimize(copy.deepcopy(untouched), SELECTOR, min_length=0)
    dense = mode.run(untouched, inputs)
    graphs = windows = 0
    masks: dict[str, int] = {}
    if mode.through == "eager":
        with record_attention(optimized) as records:
            mode.run(optimized, inputs)
        sparse = sum(record.decision == "sparse" for record in records)
        windows = sum(record.window for record in records)
        reasons = dict(Counter(r.reason for r in records if r.reason is not None))
        output, calls = recorded(lambda: mode.run(optimized, inputs))
        full = mode.run(optimize(optimized, EVERYTHING, min_length=0), inputs)
    else:
        torch._dynamo.reset()
        traced = Traced()
        run, model = _trace(optimized, mode, inputs, traced)
        output, calls = recorded(lambda: run(model, inputs))
        sparse, reasons = traced.decisions()
        graphs = len(traced.graphs)
        windows = sum(len(report.windows) for report in traced.reports)
        masks = traced.masks()
        traced.keep_everything()
        full = run(model, inputs)
        assert len(traced.graphs) == graphs
        torch._dynamo.reset()

    exact_model = in_float64(untouched)
    exact_inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    exact = replayed(lambda: mode.run(exact_model, exact_inputs), calls, SELECTOR)
    plain = replayed(lambda: mode.run(untouched, inputs), calls, SELECTOR)
    return Cell(
        sparse=sparse,
        dense=reasons,
        graphs=graphs,
        windows=windows,
        masks=masks,
        error=rmse(output, exact),
        plain_error=rmse(plain, exact),
        full_error=rmse(full, dense),
        change=rmse(output, dense),
    )


def _trace(model: Any, mode: Mode, inputs: Inputs, traced: Traced) -> tuple[Run, Any]:
    """What to run in place of ``mode.run`` and ``model``."""
    if mode.through == "compile":
        return mode.run, torch.compile(model, backend=traced, fullgraph=True)
    if mode.through == "module.compile":
        model.compile(backend=traced, fullgraph=True)
        return mode.run, model
    options = without_cache(model)
    program = torch.export.export(model, (), {**inputs, **options}, strict=False)
    exported = program.module()
    traced(exported)
    return partial(forward, **options), exported
