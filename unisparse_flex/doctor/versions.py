"""Versions of Python, torch and the packages that the library works with."""

from __future__ import annotations

import platform
import sys

from ..block_masks.installation import installed_version
from .finding import Finding, Status

LEAST_PYTHON = (3, 11)
# Package: least version, what it is for, how it is installed.
OPTIONAL = {
    "triton": ("", "selection and attention on GPUs", "comes with torch's CUDA builds"),
    "transformers": ("5.4", "Hugging Face models", "pip install 'unisparse-flex[transformers]'"),
    "matplotlib": ("", "pictures", "pip install 'unisparse-flex[viz]'"),
}
LEAST_TORCH = "2.11"


def check_python() -> Finding:
    """Whether this Python is new enough."""
    found = platform.python_version()
    if sys.version_info < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        return Finding(
            name="python",
            status=Status.PROBLEM,
            detail=f"{found}, older than {least}",
            fix=f"make an environment with Python {least} or newer",
        )
    return Finding(name="python", status=Status.OK, detail=found)


def check_torch() -> Finding:
    """Whether this torch is new enough."""
    import torch

    found = str(torch.__version__)
    if is_older(found, LEAST_TORCH):
        return Finding(
            name="torch",
            status=Status.PROBLEM,
            detail=f"{found}, older than {LEAST_TORCH}",
            fix=f"pip install 'torch>={LEAST_TORCH}'",
        )
    return Finding(name="torch", status=Status.OK, detail=found)


def check_optional_packages(*, on_cuda: bool) -> list[Finding]:
    """The optional packages: absent is a note, too old a problem.

    Args:
        on_cuda: Whether there is a GPU; without one Triton is not needed.
    """
    findings = []
    for package, (least, purpose, install) in OPTIONAL.items():
        found = installed_version(package)
        if found is None and package == "triton" and not on_cuda:
            detail = "not installed; not needed on the CPU"
            findings.append(Finding(name=package, status=Status.OK, detail=detail))
            continue
        if found is None:
            detail, status = f"not installed; needed for {purpose}", Status.NOTE
        elif least and is_older(found, least):
            detail, status = f"{found}, older than {least}; needed for {purpose}", Status.PROBLEM
        else:
            findings.append(Finding(name=package, status=Status.OK, detail=found))
            continue
        findings.append(Finding(name=package, status=status, detail=detail, fix=install))
    return findings


def is_older(found: str, least: str) -> bool:
    """Whether the leading numbers of one version are below those of another."""
    return _numbers(found) < _numbers(least)


def _numbers(text: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
