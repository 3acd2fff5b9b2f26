"""Whether torch has the private names that the library uses."""

from __future__ import annotations

from ..private_names import PRIVATE_NAMES, WORKING_TORCH, missing_names
from .finding import Finding, Status


def check_private_names() -> Finding:
    """Whether torch has the private names that the library uses."""
    missing = missing_names()
    if missing:
        return Finding(
            name="torch's private names",
            status=Status.PROBLEM,
            detail=f"{len(missing)} of {len(PRIVATE_NAMES)} missing: {', '.join(missing)}",
            fix=f"install a torch that works with this release: {WORKING_TORCH}",
        )
    return Finding(
        name="torch's private names",
        status=Status.OK,
        detail=f"all {len(PRIVATE_NAMES)} present",
    )
