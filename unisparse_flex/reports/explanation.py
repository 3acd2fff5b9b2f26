"""`explain`: which attention calls of a model run sparse, which stay dense, and why."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..block_masks import BlockSelection, valid_blocks
from ..block_masks.selectors import selector_of_quality
from ..calibration import Calibration
from ..calibration_fit import describe_calibration
from ..catching import hint_at_tensors, is_intercepted, original_module, settings_of
from ..counted import counted
from ..integrations.transformers_config import KEYS as SAVED_KEYS
from ..integrations.transformers_config import saved_values, stated
from ..optimization import calibration_of, registered_name
from ..passes import DenseReason, SparseConfig, observe_calls
from ..passes.attend import MULTIHEAD_TARGETS, keeps_window, logit_scale, refuse_multihead
from ..passes.calls import TORCH_SDPA, SdpaCall, own_function
from ..passes.decision import flash_obstacle, forecast_call, lacks_kernel_for_mask, refuse
from ..wrapping import wrap
from .advice import SPARSER, next_step
from .attention_record import AttentionRecord, fill_blocks, sparse_densities
from .density import BY_COST, mean_density
from .explain_table import COLUMNS, MANY_LINES, format_table, terminal_columns
from .gains import predicted_ms, prefill_ms
from .kept_settings import quality_of
from .rest_time import RestClock
from .verdict import PYTHON, verdict
from .wording import Wording

MASK_NOTE = (
    "where torch.compile proves what an attn_mask is, it keeps small windows whole: "
    "runs and density can differ"
)
SELECTION_NOTE = "PyTorch code selects the blocks of {calls}, slower than the GPU kernels: {reason}"
KERNEL_NOTE = (
    "FlexAttention's own kernel attends in {calls}, slower than FlashAttention-4: {reason}"
)

# Of calls that a kernel could take: sparse, or dense for want of one or of length.
UP_TO_KERNELS = (None, DenseReason.NO_KERNEL, DenseReason.SHORT)

# What a language model takes.
INPUTS = "give token ids as a Tensor, or a tokenizer's tensors by name: explain(model, **inputs)"


@dataclass(frozen=True, slots=True)
class Explanation:
    """The attention calls of one forward pass, in order.

    It prints as a verdict, a table and what to do next, after a long table with the verdict again.

    Its milliseconds are predictions of the cost model, at the density that was measured where the
    call runs sparse and at the one that the selector expects where it stays dense.
    "sparse from" is the fewest keys from which a call of that shape is predicted to be faster
    sparse, at the density that the selector expects.

    Attributes:
        calls: One record per call.
        rest_ms: Milliseconds that this forward pass took outside attention, uncompiled; ``None``
            where that could not be told apart.
        wording: How advice spells settings: as Python's arguments or as the command's options.
        all_logits: Whether the model computed logits of every position where it could have been
            told not to, by ``logits_to_keep``.
        calibration: That gave the model its settings, for a note; ``None`` where none did.
    """

    calls: tuple[AttentionRecord, ...]
    rest_ms: float | None = None
    wording: Wording = PYTHON
    all_logits: bool = False
    calibration: Calibration | None = None

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
        """Mean density of the sparse calls that choose blocks; ``None`` without a sparse call.

        Calls that keep a whole narrow window are left out, unless all do.
        """
        return mean_density(sparse_densities(self.sparse))

    @property
    def predicted_ms(self) -> tuple[float, float]:
        """Milliseconds of attention with every call dense, and as decided.

        Of calls without a prediction nothing is known: they count in neither.
        """
        return predicted_ms(self.calls)

    @property
    def prefill_ms(self) -> tuple[float, float] | None:
        """Milliseconds of the whole forward pass with every call dense, and as decided.

        `predicted_ms` and `rest_ms`; ``None`` where the rest is unknown, a call has no prediction,
        or it was a step of decoding.
        """
        return prefill_ms(self.calls, self.rest_ms)

    def notes(self) -> list[str]:
        """What has to be known to read the calls, a sentence each."""
        predictions = [call.prediction for call in self.calls if call.prediction]
        notes = []
        if self.calibration is not None:
            longest = max((call.kv_len for call in self.calls), default=0)
            notes.append(f"selector: {describe_calibration(self.calibration, longest)}")
        notes += dict.fromkeys(found.note for found in predictions if found.note)
        notes += [
            f"{call.layer}: {counted(call.unjudged, 'query block', 'keep')} all: "
            "NaN or infinity is held or seen"
            for call in self.calls
            if call.unjudged
        ]
        for what, field in ((SELECTION_NOTE, "plain_selection"), (KERNEL_NOTE, "own_kernel")):
            reasons = Counter(getattr(call, field) for call in self.sparse)
            notes += [
                what.format(calls=counted(count, "call"), reason=reason)
                for reason, count in reasons.items()
                if reason is not None
            ]
        if any(call.may_differ_compiled for call in self.calls):
            notes.append(MASK_NOTE)
        return notes

    @property
    def verdict(self) -> str:
        """A sentence: how many calls run sparse, what they keep, what that is predicted to give.

        Layers that are predicted to be slower sparse than dense are named.
        """
        return verdict(self.calls, self.rest_ms, self.wording)

    @property
    def next_step(self) -> str:
        """What to do next."""
        return next_step(self.calls, self.rest_ms, self.wording)

    def table(self, columns: int = COLUMNS) -> str:
        """The calls as a table, the reasons of the dense ones below it.

        Args:
            columns: Most characters in a line; names of layers lose their beginnings for it.
        """
        return "\n".join(format_table(self.calls, columns, self.rest_ms, self.all_logits))

    def __str__(self) -> str:
        columns = terminal_columns()
        table = self.table(columns)
        again = [self.verdict] if table.count("\n") >= MANY_LINES else []
        parts = [self.verdict, *self.notes(), *again, f"next: {self.next_step}"]
        first, *rest = (wrap(part, columns) for part in parts)
        return "\n".join([first, "", table, *rest] if self.calls else [first, *rest])


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Runs ``model(*args, **kwargs)`` once, uncompiled, and says what each attention call does.

    A compiled model is explained through the module that was compiled: it makes the same
    decisions and selects the same blocks. An ``attn_mask`` is read for that; one that no formula
    says here may still be proved to be one where it is compiled, which has faster kernels and
    whose small sliding windows are kept whole.

    What it says of the whole prefill is of this very forward pass: give ``logits_to_keep=1`` to a
    causal model of transformers for a prefill as ``generate`` and the commands run it.

    Args:
        model: An optimized model, compiled or not; any other is explained as all dense.
        *args: Passed to the model.
        **kwargs: Passed to the model.

    Returns:
        One record per attention call.

    Raises:
        TypeError: ``model`` is no module, fails on a text, a list or a mapping among its inputs, or
            is to be given an argument of `optimize`.
    """
    module = _validate_module(model)
    wording = _wording_of(module)
    if module is not model:
        wording = replace(wording, compiled=True)
    _refuse_settings(module, kwargs, wording)
    clock = RestClock(module)
    with (
        record_attention(model, clock=clock, as_compiled=True) as calls,
        torch.no_grad(),
        hint_at_tensors(args, kwargs, INPUTS),
    ):
        module(*args, **kwargs)
    every = _computes_all_logits(module, kwargs)
    found = calibration_of(module)
    return Explanation(tuple(calls), clock.milliseconds, wording, every, found)


def _computes_all_logits(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """See `Explanation.all_logits`."""
    known = inspect.signature(module.forward).parameters.get("logits_to_keep")
    kept = None if known is None else kwargs.get("logits_to_keep", known.default)
    # Of transformers: none is named, so all are computed.
    return isinstance(kept, int) and kept == 0


def _wording_of(module: nn.Module) -> Wording:
    """How advice on a model is spelled in Python."""
    saved = saved_settings(module)
    # Settings of `optimize` win over those of a name.
    name = None if is_intercepted(module) else registered_name(module)
    compiled = any(each._compiled_call_impl is not None for each in module.modules())
    return Wording(
        registered=name, saved=saved, calibrated=is_calibrated(module), compiled=compiled
    )


def saved_settings(module: nn.Module) -> Mapping[str, Any]:
    """See `Wording.saved`."""
    saved = saved_values(module)
    known = isinstance(saved, Mapping) and set(saved) <= set(SAVED_KEYS)
    return stated(saved) if known else {}


def is_calibrated(module: nn.Module) -> bool:
    """Whether a calibration gave a model its settings: outside the layers it names all is dense."""
    outermost = next((found for each in module.modules() if (found := settings_of(each))), None)
    return outermost is not None and SparseConfig.decode(outermost).dense


def _refuse_settings(module: nn.Module, kwargs: Mapping[str, Any], wording: Wording) -> None:
    """Raises where settings are given as inputs: a model may swallow names that it has no use for.

    Raises:
        TypeError: No forward in the model names them.
    """
    for name in (each for each in SAVED_KEYS if each in kwargs):
        forwards = (each.forward for each in module.modules())
        if not any(name in inspect.signature(forward).parameters for forward in forwards):
            way_out = wording.setting(name, kwargs[name], {})
            raise TypeError(
                f"explain gives its arguments to the model, which takes no {name}, got "
                f"{name}={kwargs[name]!r}; it is a setting: {way_out}, then explain it again"
            )


@contextmanager
def record_attention(
    model: nn.Module, *, clock: RestClock | None = None, as_compiled: bool = False
) -> Iterator[list[AttentionRecord]]:
    """Records the attention calls that ``model`` makes inside, running uncompiled.

    Args:
        model: The model that will be called.
        clock: Times what is not attention.
        as_compiled: See `observe_calls`.

    Yields:
        A list that grows by one record per call.

    Raises:
        TypeError: ``model`` is no module.
    """
    module = _validate_module(model)
    calls: list[AttentionRecord] = []
    path: list[str] = []

    def record(
        call: SdpaCall,
        config: SparseConfig | None,
        selection: BlockSelection | None,
        reason: DenseReason | None,
    ) -> None:
        add(_record(path[-1] if path else "", call, config, selection, reason))

    def add(found: AttentionRecord) -> None:
        calls.append(found)
        if clock is not None:
            clock.saw_attention()

    with ExitStack() as stack:
        if clock is not None:
            stack.enter_context(clock.running())
        for name, submodule in module.named_modules():
            track_layer(stack, submodule, name or type(submodule).__name__, path)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(observe_calls(record, as_compiled=as_compiled))
        stack.enter_context(_LeftAlone(record, add, path))
        yield calls


class _LeftAlone(TorchFunctionMode):
    """Sees the attention functions that no marker stands for."""

    def __init__(
        self, record: Any, add: Callable[[AttentionRecord], None], path: list[str]
    ) -> None:
        super().__init__()
        self.record, self.add, self.path = record, add, path

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
            self.add(AttentionRecord(layer=layer, decision="dense", reason=reason))
        return func(*args, **kwargs)


def track_layer(stack: ExitStack, module: nn.Module, name: str, path: list[str]) -> None:
    """Keeps the name of the running module at the end of ``path`` until ``stack`` closes."""

    def enter(*_: Any) -> None:
        path.append(name)

    def leave(*_: Any) -> None:
        path.pop()

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave, always_call=True).remove)


def _validate_module(model: object) -> nn.Module:
    module: object = original_module(model)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, optimized or not, got {_type_name(module)}; of a "
            "pipeline pass the module that attends, such as pipeline.transformer or pipeline.model"
        )
    return module


def _type_name(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


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
        window=selection is not None and keeps_window(selection.geometry),
        unjudged=0 if selection is None else _count_unjudged(call, selection),
        plain_selection=plain,
        own_kernel=own,
        prediction=None if config is None else forecast_call(call, config.selector, density),
        config=config,
        sparser=_sparser(call, config, reason),
        lacks_mask_kernel=reason in UP_TO_KERNELS and four and lacks_kernel_for_mask(call),
    )


def _sparser(
    call: SdpaCall, config: SparseConfig | None, reason: DenseReason | None
) -> tuple[str, int] | None:
    """See `AttentionRecord.sparser`."""
    if config is None or reason not in BY_COST:
        return None
    quality = quality_of(config.selector)
    while (quality := SPARSER.get(quality)) is not None:
        selector = selector_of_quality(quality)
        found = forecast_call(call, selector)
        if found is None or found.break_even is None:
            continue
        if refuse(call, replace(config, selector=selector)) is None:
            return quality, found.break_even
        return quality, max(found.break_even, fill_blocks(call.key.shape[2], selector.block_size))
    return None


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
