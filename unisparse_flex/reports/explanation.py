"""`explain`: which attention calls of a model run sparse, which stay dense, and why."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..block_masks import BlockSelection, valid_blocks
from ..catching import original_module
from ..passes import DenseReason, SparseConfig, observe_calls
from ..passes.attend import MULTIHEAD_TARGETS, logit_scale, refuse_multihead
from ..passes.calls import TORCH_SDPA, SdpaCall, own_function
from ..passes.decision import CallForecast, flash_obstacle, forecast_call

COLUMNS = (
    *("layer", "queries", "keys", "heads", "runs", "density"),
    *("dense ms", "sparse ms", "break-even", "reason"),
)
# What the cost model says is no measurement.
UNITS = ("",) * 6 + ("predicted",) * 3 + ("",)
TABLE_WIDTH, LEAST_REASON_WIDTH = 118, 19
SLOWER_NOTE = (
    "sparse is predicted slower than dense for some calls, at the density that was measured: bound "
    "it with top_k, or leave these layers dense (dense_layers, calibrate)"
)
MASK_NOTE = (
    "where torch.compile proves what an attn_mask is, it keeps small windows whole: "
    "runs and density can differ"
)
SELECTION_NOTE = (
    "PyTorch code selects the blocks of {count} calls, slower than the GPU kernels: {reason}"
)
KERNEL_NOTE = (
    "FlexAttention's own kernel attends in {count} calls, slower than FlashAttention-4: {reason}"
)
NO_CALL_NOTE = (
    "no attention call was seen: the model computes attention itself or with its own "
    "kernels; for Hugging Face models load with attn_implementation='sdpa'"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionRecord:
    """One attention call of one forward pass.

    Attributes:
        layer: Name of the module that made the call.
        q_len: Query rows, or 0 where the call does not say.
        kv_len: Keys, or 0.
        heads: Query and key heads, such as ``"9/3"``.
        masked: Whether the call carries a mask, a tensor as the model runs uncompiled.
        decision: ``"sparse"`` or ``"dense"``.
        reason: Why it stays dense; ``None`` where it runs sparse.
        density: Kept over visible blocks in [0, 1]; ``None`` where it stays dense.
        unjudged: Query blocks, counted in every head, that keep all they see because they hold or
            see a NaN or an infinity.
        plain_selection: Why PyTorch code selects its blocks instead of GPU kernels; ``None`` where
            kernels do, where there is no GPU, or where it stays dense.
        own_kernel: Why FlexAttention's own kernel attends instead of FlashAttention-4; ``None``
            where that does or was not to be used, where there is no GPU, or where it stays dense.
        prediction: Milliseconds and break-even length by the cost model; ``None`` where it says
            nothing: no settings, or no block-sparse kernel for the call.
    """

    layer: str
    q_len: int = 0
    kv_len: int = 0
    heads: str = ""
    masked: bool = False
    decision: str
    reason: DenseReason | None = None
    density: float | None = None
    unjudged: int = 0
    plain_selection: str | None = None
    own_kernel: str | None = None
    prediction: CallForecast | None = None

    @property
    def may_differ_compiled(self) -> bool:
        """Whether proving what the mask is could change the decision or the density."""
        return self.masked and self.reason in (None, DenseReason.SLOWER, DenseReason.NO_KERNEL)

    def cells(self) -> tuple[str, ...]:
        """The record as a row of the table."""
        density = "" if self.density is None else f"{self.density:.3f}"
        lengths = tuple(str(n) if n else "" for n in (self.q_len, self.kv_len))
        predicted: tuple[str, ...] = ("", "", "")
        if self.prediction is not None:
            milliseconds = self.prediction.dense_ms, self.prediction.sparse_ms
            break_even = str(self.prediction.break_even or "never")
            predicted = (*(_three_digits(ms) for ms in milliseconds), break_even)
        head = (self.layer, *lengths, self.heads, self.decision, density)
        return (*head, *predicted, self.reason or "")


@dataclass(frozen=True, slots=True)
class Explanation:
    """The attention calls of one forward pass, in order; prints as a table.

    Its milliseconds are predictions of the cost model, at the density that was measured where the
    call runs sparse and at the one that the selector expects where it stays dense. Its break-even
    is the fewest keys from which a call of that shape is predicted to be faster sparse, at the
    density that the selector expects.

    Attributes:
        calls: One record per call.
    """

    calls: tuple[AttentionRecord, ...]

    @property
    def sparse(self) -> tuple[AttentionRecord, ...]:
        """The calls that run sparse."""
        return tuple(call for call in self.calls if call.decision == "sparse")

    @property
    def dense(self) -> tuple[AttentionRecord, ...]:
        """The calls that stay dense."""
        return tuple(call for call in self.calls if call.decision == "dense")

    @property
    def density(self) -> float | None:
        """Mean density of the sparse calls; ``None`` where there are none."""
        kept = [call.density for call in self.sparse if call.density is not None]
        return sum(kept) / len(kept) if kept else None

    @property
    def predicted_ms(self) -> tuple[float, float]:
        """Milliseconds of attention with every call dense, and as decided.

        Of calls without a prediction nothing is known: they count in neither.
        """
        known = [(call, p) for call in self.calls if (p := call.prediction) is not None]
        dense = sum(p.dense_ms for _, p in known)
        return dense, sum(p.sparse_ms if c.decision == "sparse" else p.dense_ms for c, p in known)

    def notes(self) -> list[str]:
        """What has to be known to read the calls, a sentence each."""
        if not self.calls:
            return [NO_CALL_NOTE]
        predictions = [call.prediction for call in self.calls if call.prediction]
        notes = list(dict.fromkeys(found.note for found in predictions if found.note))
        if any(p.sparse_ms > p.dense_ms for c in self.sparse if (p := c.prediction) is not None):
            notes.append(SLOWER_NOTE)
        notes += [
            f"{call.layer}: {call.unjudged} query blocks hold or see NaN or infinity and keep all"
            for call in self.calls
            if call.unjudged
        ]
        for what, field in ((SELECTION_NOTE, "plain_selection"), (KERNEL_NOTE, "own_kernel")):
            reasons = Counter(getattr(call, field) for call in self.sparse)
            notes += [
                what.format(count=count, reason=reason)
                for reason, count in reasons.items()
                if reason is not None
            ]
        if any(call.may_differ_compiled for call in self.calls):
            notes.append(MASK_NOTE)
        return notes

    def __str__(self) -> str:
        if not self.calls:
            return NO_CALL_NOTE
        rows = [COLUMNS, UNITS, *(call.cells() for call in self.calls)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        before = sum(widths[:-1]) + 2 * len(widths[:-1])
        widths[-1] = min(widths[-1], max(TABLE_WIDTH - before, LEAST_REASON_WIDTH))
        lines = [line for row in rows for line in _lines(row, widths)]
        lines.insert(2, "  ".join("-" * width for width in widths))
        mean = "" if self.density is None else f", mean density {self.density:.3f}"
        lines.append(f"{len(self.sparse)} sparse{mean}, {len(self.dense)} dense")
        if known := sum(call.prediction is not None for call in self.calls):
            dense, decided = (_three_digits(ms) for ms in self.predicted_ms)
            of = "" if known == len(self.calls) else f" of {known} calls"
            lines.append(f"predicted attention time{of}: {decided} ms, all dense {dense} ms")
        lines += self.notes()
        return "\n".join(line.rstrip() for line in lines)


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Runs ``model(*args, **kwargs)`` once, uncompiled, and says what each attention call does.

    A compiled model is explained through the module that was compiled: it makes the same
    decisions and selects the same blocks, but where a call carries an ``attn_mask``. That is a
    tensor here; compiled, it may be proved to be a formula, which has faster kernels and whose
    small sliding windows are kept whole.

    Args:
        model: An optimized model, compiled or not; any other is explained as all dense.
        *args: Passed to the model.
        **kwargs: Passed to the model.

    Returns:
        One record per attention call.
    """
    with record_attention(model) as calls, torch.no_grad():
        original_module(model)(*args, **kwargs)
    return Explanation(tuple(calls))


@contextmanager
def record_attention(model: nn.Module) -> Iterator[list[AttentionRecord]]:
    """Records the attention calls that ``model`` makes inside, running uncompiled.

    Args:
        model: The model that will be called.

    Yields:
        A list that grows by one record per call.
    """
    module = original_module(model)
    calls: list[AttentionRecord] = []
    path: list[str] = []

    def record(
        call: SdpaCall,
        config: SparseConfig | None,
        selection: BlockSelection | None,
        reason: DenseReason | None,
    ) -> None:
        calls.append(_record(path[-1] if path else "", call, config, selection, reason))

    with ExitStack() as stack:
        for name, submodule in module.named_modules():
            track_layer(stack, submodule, name or type(submodule).__name__, path)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(observe_calls(record))
        stack.enter_context(_LeftAlone(record, calls, path))
        yield calls


class _LeftAlone(TorchFunctionMode):
    """Sees the attention functions that no marker stands for."""

    def __init__(self, record: Any, calls: list[AttentionRecord], path: list[str]) -> None:
        super().__init__()
        self.record, self.calls, self.path = record, calls, path

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs, func = kwargs or {}, own_function(func)
        if func is TORCH_SDPA:
            call = SdpaCall.bind(args, kwargs)
            nested = call.query.is_nested
            self.record(
                call, None, None, DenseReason.NOT_DENSE if nested else DenseReason.NOT_OPTIMIZED
            )
        elif func in MULTIHEAD_TARGETS.values():
            reason = refuse_multihead(func, args, kwargs) or DenseReason.NOT_OPTIMIZED
            layer = self.path[-1] if self.path else ""
            self.calls.append(AttentionRecord(layer=layer, decision="dense", reason=reason))
        return func(*args, **kwargs)


def track_layer(stack: ExitStack, module: nn.Module, name: str, path: list[str]) -> None:
    """Keeps the name of the running module at the end of ``path`` until ``stack`` closes."""

    def enter(*_: Any) -> None:
        path.append(name)

    def leave(*_: Any) -> None:
        path.pop()

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave, always_call=True).remove)


def _lines(row: tuple[str, ...], widths: list[int]) -> list[str]:
    """A row of the table, its last cell wrapped."""
    *cells, last = row
    first, *more = textwrap.wrap(last, widths[-1]) or [""]
    line = "  ".join(c.ljust(w) for c, w in zip([*cells, first], widths, strict=True))
    indent = " " * (sum(widths[:-1]) + 2 * len(cells))
    return [line, *(indent + rest for rest in more)]


def _three_digits(milliseconds: float) -> str:
    return f"{milliseconds:.{max(0, 2 - len(str(int(milliseconds))) + 1)}f}"


def _record(
    layer: str,
    call: SdpaCall,
    config: SparseConfig | None,
    selection: BlockSelection | None,
    reason: DenseReason | None,
) -> AttentionRecord:
    query: Tensor = call.query
    if query.is_nested:
        # Of many lengths.
        return AttentionRecord(layer=layer, decision="dense", reason=reason)
    four = query.dim() == 4
    plain = own = None
    if selection is not None and config is not None and query.device.type == "cuda":
        plain = config.selector.kernel_obstacle(
            query,
            call.key,
            geometry=selection.geometry,
            scale=logit_scale(call),
            attn_mask=call.attn_mask,
        )
        if config.backend != "triton":
            own = flash_obstacle(call, selection.geometry.block_size)
    density = None if selection is None else selection.density()
    return AttentionRecord(
        layer=layer,
        q_len=query.shape[-2] if query.dim() > 1 else 0,
        kv_len=call.key.shape[-2] if call.key.dim() > 1 else 0,
        heads=f"{query.shape[1]}/{call.key.shape[1]}" if four else "",
        masked=call.attn_mask is not None,
        decision="dense" if selection is None else "sparse",
        reason=reason,
        density=density,
        unjudged=0 if selection is None else _count_unjudged(call, selection),
        plain_selection=plain,
        own_kernel=own,
        prediction=None if config is None else forecast_call(call, config.selector, density),
    )


def _count_unjudged(call: SdpaCall, selection: BlockSelection) -> int:
    """Query blocks, in every head, kept whole for what is not finite among what they see."""
    heads, geometry = call.query.shape[1], selection.geometry
    query, key = (
        valid_blocks(~tensor.isfinite().all(-1), blocks, geometry.block_size, tensor.device)
        for tensor, blocks in (
            (call.query, geometry.num_q_blocks),
            (call.key, geometry.num_kv_blocks),
        )
    )
    if not (query.any() or key.any()):
        return 0
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    keep, visible = torch.broadcast_tensors(selection.keep, selection.visible)
    reached = query | (visible & key[:, :, None]).any(-1)
    return int((reached & (keep == visible).all(-1)).sum())
