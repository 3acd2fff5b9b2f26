"""`register`: what vLLM calls when it loads its plug-ins."""

from __future__ import annotations

import logging

# Where vLLM looks for plug-ins, and this one's name there, as in pyproject.toml.
GROUP = "vllm.general_plugins"
ENTRY_POINT = "unisparse"
PATH = "unisparse_flex.integrations.vllm.backend.Backend"


def register() -> None:
    """Makes the backend known to vLLM as ``CUSTOM``; may be called more than once.

    The entry point of the group ``vllm.general_plugins``. Where vLLM runs on the CPU its only
    backend is replaced; without settings that one stays as it is.
    """
    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        # Every vLLM that is installed beside this library comes here, also those that use no part
        # of it: a message, no error.
        logging.getLogger(__name__).warning(
            "unisparse_flex found no registry of attention backends in this vLLM: %s", error
        )
        return
    register_backend(AttentionBackendEnum.CUSTOM, PATH)
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, PATH)
