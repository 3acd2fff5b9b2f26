"""Time to first token of a model on one prompt: dense eager, dense compiled and sparse compiled."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..calibration import Calibration
from ..clock import CpuWatch, in_turn, timed
from ..optimization import optimize
from ..selectors import Selector
from .measure import compute_kl, compute_log_probs
from .model import LoadedModel
from .quality import Sparsity, TextPrompt
from .read_blocks import watch_blocks
from .rival_attention import judged, use_rival
from .rivals import LoadedRival

CompileScope = Literal["layers", "model"]
OTHER_WORK = "other work"
# Of an error that is kept in a row.
_ERROR_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedRow:
    """One way to run the model on one prompt.

    Attributes:
        tokens: Length of the prompt.
        run: ``"dense eager"``, ``"dense compiled"``, ``"sparse compiled"`` or ``"other work"``.
        setting: What the setting, or the other work, is called; ``None`` where dense.
        ms: Milliseconds from the prompt to the logits of its last token, median of ``times_ms``;
            ``None`` where the run failed.
        times_ms: Of each repeat, warm.
        first_call_seconds: The first of the two calls before them, compilation included.
        density: Kept over visible blocks, mean over the calls that choose; one that could be sparse
            but stays dense, by the settings or because that is predicted to be faster, counts as 1;
            ``None`` without a sparse call.
        sparse_density: The density of the sparse calls alone.
        sparse_calls: Attention calls that run sparse, or by the other work.
        calls: Attention calls in all.
        windows: Of the sparse calls, those that keep a whole sliding window; the density is of the
            others, where there are some.
        kl_last_token: KL of the next-token distribution after the prompt to that of the first
            dense run, in nats; ``None`` where there is none to compare.
        same_token: Whether the likeliest token is the same.
        output_error: Relative root mean square error of attention's output to dense attention on
            the same tensors, mean over the calls by the other work; ``None`` of other runs.
        worst_output_error: The largest of them.
        error: Why the run failed.
    """

    tokens: int
    run: str
    setting: str | None = None
    ms: float | None = None
    times_ms: tuple[float, ...] = ()
    first_call_seconds: float | None = None
    density: float | None = None
    sparse_density: float | None = None
    sparse_calls: int = 0
    calls: int = 0
    windows: int = 0
    kl_last_token: float | None = None
    same_token: bool | None = None
    output_error: float | None = None
    worst_output_error: float | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """The run in words."""
        if self.setting is None:
            return self.run
        return self.setting if self.run == OTHER_WORK else f"sparse, {self.setting}"

    def to_json(self) -> dict[str, Any]:
        """The row as values that JSON holds."""
        return asdict(self) | {"name": self.name, "times_ms": list(self.times_ms)}


class SpeedInterrupted(KeyboardInterrupt):
    """`measure_speed` was interrupted.

    Attributes:
        rows: The ways that were begun, each with the times that it had so far.
    """

    def __init__(self, rows: Sequence[SpeedRow]) -> None:
        super().__init__()
        self.rows = list(rows)


@dataclass(kw_only=True, slots=True, eq=False)
class _Contender:
    """A copy of the model that shares its weights, and what was found of it so far."""

    run: str
    setting: str | None
    found: dict[str, Any]
    first_token: Callable[[], Tensor] | None = None
    log_probs: Tensor | None = None
    seconds: list[float] = field(default_factory=list)

    def attempt(self, action: Callable[[], Any]) -> None:
        """Does something; what goes wrong stays in the row and ends this contender alone."""
        try:
            action()
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            text = f"{type(error).__name__}: {' '.join(lines[:3])}"
            self.found["error"], self.first_token = text[:_ERROR_CHARACTERS], None


def measure_speed(
    loaded: LoadedModel,
    prompt: TextPrompt,
    settings: Mapping[str, Selector | Calibration],
    *,
    compile_scope: CompileScope = "layers",
    repeats: int = 3,
    sparsity: Sparsity | None = None,
    rivals: Sequence[LoadedRival] = (),
    show: Callable[[str], None] = lambda step: None,
    watch: CpuWatch | None = None,
) -> list[SpeedRow]:
    """Times the first token: every way twice to warm up, then all in turn, ``repeats`` times.

    The ways share one set of weights. What one of them cannot do, for want of memory or of a
    compiler, is an error in its row.

    Args:
        loaded: The model, plain; it stays so.
        prompt: What it reads.
        settings: Selectors, or calibrations, by what they are called; each is a way to run the
            model.
        compile_scope: ``"layers"`` compiles each layer of the model by itself, ``"model"`` all of
            it at once; Hugging Face's models build a mask tensor in the latter.
        repeats: Timed runs of each way.
        sparsity: How the model is made sparse; by default as `optimize` does it, where the cost
            model decides.
        rivals: Packages of other work to run the attention of the model by; its layers are
            compiled around them, each by itself.
        show: Told what comes next.
        watch: Watches what is timed.

    Raises:
        ValueError: ``compile_scope`` is ``"layers"`` and the model has no stack of layers.
        SpeedInterrupted: A KeyboardInterrupt came; it holds what was timed.
    """
    sparsity = Sparsity(min_length=None) if sparsity is None else sparsity
    if compile_scope == "layers":
        find_layers(loaded.model)
    watch = watch or CpuWatch()
    torch.compiler.reset()
    contenders: list[_Contender] = []
    running: list[_Contender] = []
    ways: list[tuple[str, str | None, Selector | Calibration | LoadedRival | None]] = [
        ("dense eager", None, None),
        ("dense compiled", None, None),
        *(("sparse compiled", name, selector) for name, selector in settings.items()),
        *((OTHER_WORK, rival.name, rival) for rival in rivals),
    ]
    try:
        for run, setting, attention in ways:
            contender = _Contender(run=run, setting=setting, found={})
            show(f"{setting or run}, {prompt.tokens} tokens: first call")
            contenders.append(contender)
            contender.attempt(
                partial(_begin, contender, loaded, prompt, attention, compile_scope, sparsity)
            )
        running = [each for each in contenders if each.first_token is not None]
        in_turn(
            [partial(_clock, each, loaded, prompt, show, watch) for each in running],
            repeats=1 + repeats,
        )
    except KeyboardInterrupt:
        raise SpeedInterrupted(_rows(contenders, prompt, unfinished="interrupted")) from None
    else:
        return _rows(contenders, prompt)
    finally:
        contenders.clear()
        running.clear()
        torch.compiler.reset()


def _clock(
    contender: _Contender,
    loaded: LoadedModel,
    prompt: TextPrompt,
    show: Callable[[str], None],
    watch: CpuWatch,
) -> float:
    """Times a way once, unless it failed before."""
    show(f"{contender.setting or contender.run}, {prompt.tokens} tokens: timed")
    function, before = contender.first_token, len(contender.seconds)
    if function is not None:
        # The first one warms up.
        with watch.watching() if before else nullcontext():
            contender.attempt(lambda: contender.seconds.append(timed(function, loaded.device)[1]))
    return contender.seconds[-1] if len(contender.seconds) > before else 0.0


def _rows(
    contenders: Sequence[_Contender], prompt: TextPrompt, unfinished: str | None = None
) -> list[SpeedRow]:
    """What was found of each way.

    Args:
        contenders: The ways, in turn.
        prompt: What they read.
        unfinished: The error of those that have no time.
    """
    for contender in contenders:
        # The first one warms up.
        _, *seconds = contender.seconds or [0.0]
        if contender.first_token is not None and seconds:
            contender.found["times_ms"] = tuple(1e3 * each for each in seconds)
            contender.found["ms"] = 1e3 * median(seconds)
        elif unfinished is not None:
            contender.found.setdefault("error", unfinished)
    reference = next((each.log_probs for each in contenders if each.log_probs is not None), None)
    return [_row(each, prompt, reference) for each in contenders]


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The model's longest stack of layers.

    Raises:
        ValueError: There is none.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and module]
    if not stacks:
        raise ValueError(
            f"compile_scope must be 'model' for {type(model).__name__}, which has no stack of "
            "layers, got 'layers'"
        )
    return max(stacks, key=len)


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters and buffers are those of the model itself."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


@torch.no_grad()
def _begin(
    contender: _Contender,
    loaded: LoadedModel,
    prompt: TextPrompt,
    attention: Selector | Calibration | LoadedRival | None,
    compile_scope: CompileScope,
    sparsity: Sparsity,
) -> None:
    """Makes the copy that runs, with its density where sparse, and times its first call."""
    model = share_weights(loaded.model)
    accepted = inspect.signature(loaded.model.forward).parameters
    sparing = {"use_cache": False, "logits_to_keep": 1}
    inputs = {name: value for name, value in sparing.items() if name in accepted}
    if isinstance(attention, LoadedRival):
        use_rival(model, attention)
        with judged(attention) as errors:
            model(prompt.input_ids, **inputs)
        contender.found["sparse_calls"] = len(errors)
        if not errors:
            raise ValueError(
                f"{attention.name} must get a causal call of a whole prompt without a mask, and "
                "the model makes none"
            )
        contender.found["output_error"] = sum(errors) / len(errors)
        contender.found["worst_output_error"] = max(errors)
    elif attention is not None:
        optimize(
            model,
            attention,
            min_length=sparsity.min_length,
            dense_layers=sparsity.dense_layers,
            backend=sparsity.backend,
        )
        with watch_blocks(model) as read:
            model(prompt.input_ids, **inputs)
        contender.found |= {
            "calls": len(read.records),
            "sparse_calls": len(read.sparse),
            "windows": read.windows,
            "density": read.density,
            "sparse_density": read.sparse_density,
        }
    if contender.run != "dense eager":
        by_layer = compile_scope == "layers" or isinstance(attention, LoadedRival)
        compiled = find_layers(model) if by_layer else [model]
        for module in compiled:
            module.compile(dynamic=False)

    @torch.no_grad()
    def first_token() -> Tensor:
        logits: Tensor = model(prompt.input_ids, **inputs).logits[0, -1:]
        return logits

    logits, seconds = timed(first_token, loaded.device)
    contender.found["first_call_seconds"] = seconds
    contender.log_probs = compute_log_probs(logits)
    contender.first_token = first_token


def _row(contender: _Contender, prompt: TextPrompt, reference: Tensor | None) -> SpeedRow:
    found, log_probs = contender.found, contender.log_probs
    if reference is not None and log_probs is not None and "error" not in found:
        found["kl_last_token"] = compute_kl(reference, log_probs)
        found["same_token"] = bool(reference.argmax() == log_probs.argmax())
    return SpeedRow(tokens=prompt.tokens, run=contender.run, setting=contender.setting, **found)
