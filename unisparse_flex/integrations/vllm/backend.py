"""``Backend``: what vLLM imports by the name that was registered; made for the parent it needs."""

from __future__ import annotations

from typing import Any

from .options import KEY, Options
from .settings import options_of
from .versions import validate_version


def __getattr__(name: str) -> Any:
    """The backend over the parent that vLLM would choose, or that the settings name."""
    if name != "Backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import vllm
    from vllm.config import get_current_vllm_config_or_none
    from vllm.platforms import current_platform

    config = get_current_vllm_config_or_none()
    options = Options() if config is None else options_of(config)
    given = {} if config is None else config.additional_config or {}
    if current_platform.is_cpu():
        if KEY in given:
            validate_version(vllm.__version__, untested_version=options.untested_version)
        from .cpu import CpuBackend

        return CpuBackend
    validate_version(vllm.__version__, untested_version=options.untested_version)
    parent = options.parent or choose_parent(config)
    if parent == "TRITON_ATTN":
        from .triton import TritonBackend

        return TritonBackend
    from .flash import FlashBackend

    return FlashBackend


def choose_parent(config: Any) -> str:
    """Of ``FLASH_ATTN`` and ``TRITON_ATTN`` the one that vLLM prefers for a model on this GPU.

    Args:
        config: The engine's ``VllmConfig``; without it, what vLLM prefers for most models.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import AttentionSelectorConfig

    if config is None or config.model_config is None:
        return "FLASH_ATTN"
    model = config.model_config
    wanted = AttentionSelectorConfig(
        head_size=model.get_head_size(),
        dtype=model.dtype,
        kv_cache_dtype=config.cache_config.cache_dtype,
        block_size=None,
    )
    capability = current_platform.get_device_capability()
    # In the order of vLLM's preference; others than the two have no sparse prefill here.
    found, _ = current_platform.get_valid_backends(capability, wanted)
    names = [candidate.backend.name for candidate in found]
    return next((name for name in names if name in ("FLASH_ATTN", "TRITON_ATTN")), "TRITON_ATTN")
