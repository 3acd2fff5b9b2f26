"""All findings of one machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .backends import (
    check_backend,
    check_compiler,
    check_device,
    check_selection_kernels,
    default_device,
    measure_device,
)
from .compile_check import NAME as COMPILE_CHECK
from .compile_check import check_compiled_call
from .finding import Finding, Status
from .torch_names import check_private_names
from .versions import check_optional_packages, check_python, check_torch
from .vllm_plugin import check_vllm


@dataclass(frozen=True, kw_only=True, slots=True)
class Examination:
    """What `examine` found.

    Attributes:
        findings: In the order in which they were looked for.
    """

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What does not work."""
        return tuple(f for f in self.findings if f.status is Status.PROBLEM)

    def to_json(self) -> dict[str, Any]:
        """The findings as values that JSON holds."""
        findings = [asdict(finding) for finding in self.findings]
        return {"schema": 1, "ok": not self.problems, "findings": findings}


def examine(
    *,
    compile_check: bool = True,
    measure: bool = False,
    show: Callable[[str], None] = lambda step: None,
) -> Examination:
    """Looks at this machine.

    Args:
        measure: Times the stages of attention and keeps the rates for the cost model, about a
            minute.
        compile_check: Compiles a small sparse call and compares it with its oracle: up to a
            minute where nothing is cached.
        show: Told what comes next.
    """
    device = default_device()
    measured = [measure_device(device, show)] if measure else []
    findings = [
        check_python(),
        check_torch(),
        *check_optional_packages(on_cuda=device.type == "cuda"),
        check_vllm(),
        check_private_names(),
        check_device(device),
        *measured,
        check_backend(device),
        check_selection_kernels(device),
    ]
    compiler = check_compiler(device)
    findings += [compiler] if compiler else []
    if compile_check and (compiler is None or compiler.status is Status.OK):
        show(COMPILE_CHECK)
        findings.append(check_compiled_call(device))
    return Examination(findings=tuple(findings))
