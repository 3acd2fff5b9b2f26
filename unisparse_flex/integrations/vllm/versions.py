"""The versions of vLLM that the plug-in was tested with; knows nothing of vLLM itself."""

from __future__ import annotations

# Oldest first.
TESTED = ("0.26.0", "0.32.0")


def is_tested(version: str) -> bool:
    """Whether a version, of any build, is one that was tested."""
    return version.split("+")[0] in TESTED


def validate_version(version: str, *, untested_version: bool) -> None:
    """Refuses a vLLM that nobody tried: its interfaces change from one to the next.

    Args:
        version: As vLLM states it.
        untested_version: Whether it is to be tried anyway.

    Raises:
        RuntimeError: It was not tested.
    """
    if untested_version or is_tested(version):
        return
    raise RuntimeError(
        f"vllm must be one of {', '.join(TESTED)}, got {version}, with which unisparse_flex was "
        "not tested; install one of these, or set untested_version to true in "
        "additional_config['unisparse'] to try"
    )
