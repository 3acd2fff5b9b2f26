"""`explain` of a whole model with where it ran, what was predicted and what was measured."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..block_masks.installation import installed_version
from ..catching import original_module
from ..command_line import CommandLine
from ..passes import SparseConfig, observe_calls
from ..passes.calls import SdpaCall
from .attention_record import AttentionRecord
from .explanation import Explanation, is_calibrated, record_attention, saved_settings
from .rest_time import RestClock
from .timing import CallTime, time_call
from .wording import Wording

SCHEMA = 1
PACKAGES = ("unisparse-flex", "torch", "triton", "transformers")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportedCall:
    """One attention call.

    Attributes:
        record: What `explain` says of it.
        module: Class name of the module that made it; empty where that is unknown.
        time: What was measured; ``None`` where nothing was.
    """

    record: AttentionRecord
    module: str
    time: CallTime | None

    @property
    def shown_sparse_ms(self) -> float | None:
        """What was measured sparse; ``None`` also where settings keep the call dense.

        There nobody knows what it would keep; `time` has it for comparisons all the same.
        """
        return None if self.time is None or self.record.is_excluded else self.time.sparse_ms

    def to_json(self) -> dict[str, Any]:
        """The call as values that JSON holds."""
        values = asdict(self.record)
        values["reason"] = None if self.record.reason is None else str(self.record.reason)
        values["predicted"] = values.pop("prediction")
        # What the settings of the report say already, and what the advice does.
        del values["config"], values["sparser"], values["lacks_mask_kernel"]
        return values | {
            "module": self.module,
            "measured": None if self.time is None else asdict(self.time),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainReport:
    """The attention calls of one forward pass and what they belong to.

    Attributes:
        calls: In their order.
        model: What the user calls the model.
        model_class: Its class name.
        settings: Whatever decided: selector, lengths, texts, by name, in words.
        device: In words.
        dtype: Of the weights.
        versions: Of Python and the packages; ``None`` for what is not installed.
        rest_ms: See `Explanation`.
        line: What commands in the advice go on with.
        saved: See `Wording`.
        calibrated: See `Wording`.
    """

    calls: tuple[ReportedCall, ...]
    model: str
    model_class: str
    settings: Mapping[str, str]
    device: str
    dtype: str
    versions: Mapping[str, str | None]
    rest_ms: float | None = None
    line: CommandLine = field(default_factory=CommandLine)
    saved: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = False

    @property
    def explanation(self) -> Explanation:
        """The calls as `explain` returns them, with advice for the command line."""
        records = tuple(
            call.record
            if call.time is None
            else replace(call.record, measured=(call.time.dense_ms, call.time.sparse_ms))
            for call in self.calls
        )
        wording = Wording(self.line, saved=self.saved, calibrated=self.calibrated)
        return Explanation(records, self.rest_ms, wording)

    @property
    def is_measured(self) -> bool:
        """Whether any call was timed."""
        return any(call.time is not None for call in self.calls)

    @property
    def predicted_ms(self) -> tuple[float, float] | None:
        """Predicted milliseconds of the calls with a prediction: all dense, and as decided."""
        pairs = [
            (p.dense_ms, p.sparse_ms if call.record.decision == "sparse" else p.dense_ms)
            for call in self.calls
            if (p := call.record.prediction) is not None
        ]
        return _sums(pairs)

    @property
    def measured_ms(self) -> tuple[float, float] | None:
        """Measured milliseconds of the timed calls: all dense, and as decided."""
        pairs = []
        for call in self.calls:
            if call.time is None:
                continue
            sparse = call.record.decision == "sparse" and call.time.sparse_ms is not None
            pairs.append((call.time.dense_ms, call.time.sparse_ms if sparse else None))
        return _sums([(dense, dense if other is None else other) for dense, other in pairs])

    def to_json(self) -> dict[str, Any]:
        """The report as values that JSON holds."""
        explanation = self.explanation
        totals = {
            "predicted": self.predicted_ms,
            "predicted_prefill": explanation.prefill_ms,
            "measured": self.measured_ms,
        }
        return {
            "schema": SCHEMA,
            "kind": "explain",
            "model": self.model,
            "model_class": self.model_class,
            "settings": dict(self.settings),
            "device": {"name": self.device, "dtype": self.dtype},
            "versions": dict(self.versions),
            "summary": {
                "sparse": len(explanation.sparse),
                "dense": len(explanation.dense),
                "density": explanation.density,
                **{
                    name: None if pair is None else {"dense_ms": pair[0], "decided_ms": pair[1]}
                    for name, pair in totals.items()
                },
                "rest_ms": self.rest_ms,
            },
            "verdict": explanation.verdict,
            "calls": [call.to_json() for call in self.calls],
            "notes": list(explanation.notes()),
            "next": explanation.next_step,
        }


def report_model(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    name: str,
    settings: Mapping[str, str],
    device: str,
    line: CommandLine,
    measure: bool = False,
    show: Callable[[str], None] = lambda step: None,
) -> ExplainReport:
    """Runs ``model(**inputs)`` once, uncompiled, and reports every attention call.

    Args:
        model: An optimized model, compiled or not.
        inputs: Passed to the model by name.
        name: What the user calls the model.
        settings: See `ExplainReport`.
        device: See `ExplainReport`.
        line: See `ExplainReport`.
        measure: Times every call, dense and sparse, as it is made; the first of a kind waits for
            a compilation.
        show: Told which layer comes next.
    """
    module = original_module(model)
    times: dict[int, CallTime] = {}
    clock = RestClock(module)
    with record_attention(module, clock=clock, as_compiled=True) as records:

        def observe(call: SdpaCall, config: SparseConfig, *_: Any) -> None:
            # The record of this call is already there: observers outside come first.
            show(records[-1].layer)
            if measure:
                times[len(records) - 1] = time_call(call, config)

        with observe_calls(observe), torch.no_grad():
            module(**inputs)
    classes = {path: type(inner).__name__ for path, inner in module.named_modules()}
    return ExplainReport(
        calls=tuple(
            ReportedCall(record=record, module=classes.get(record.layer, ""), time=times.get(index))
            for index, record in enumerate(records)
        ),
        model=name,
        model_class=type(module).__name__,
        settings=settings,
        device=device,
        dtype=_dtype(module),
        versions=find_versions(),
        rest_ms=clock.milliseconds,
        line=line,
        saved=saved_settings(module),
        calibrated=is_calibrated(module),
    )


def find_versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; ``None`` for what is not installed."""
    return {
        "python": platform.python_version(),
        **{package: installed_version(package) for package in packages},
    }


def _dtype(module: nn.Module) -> str:
    parameter = next(module.parameters(), None)
    return "" if parameter is None else str(parameter.dtype).removeprefix("torch.")


def _sums(pairs: list[tuple[float, float]]) -> tuple[float, float] | None:
    if not pairs:
        return None
    first, second = (sum(column) for column in zip(*pairs, strict=True))
    return first, second
