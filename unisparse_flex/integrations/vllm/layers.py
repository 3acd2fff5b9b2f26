"""Which selector a layer has, or why it stays with the parent."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ...block_masks import Selector, UniSparse
from ...counted import counted
from ...passes.calls import PER_HEAD, HeadShard, shard_selector
from .options import Options
from .reasons import Reason

logger = logging.getLogger(__name__)

FLOATING_CACHES = ("auto", "float16", "bfloat16", "float32")


def excluded_layers(options: Options, count: int) -> frozenset[int]:
    """The indices of ``dense_layers`` in a model of ``count`` layers.

    Raises:
        ValueError: One is out of range.
    """
    for index in options.dense_layers:
        if not -count <= index < count:
            raise ValueError(
                f"dense_layers must be in [{-count}, {count}) for a model of "
                f"{counted(count, 'layer')}, got {index}; leave it out"
            )
    return frozenset(index % count for index in options.dense_layers)


def setting_of(
    name: str, index: int | None, options: Options, excluded: frozenset[int]
) -> Selector | Reason:
    """The selector of a layer, or why it has none.

    Args:
        name: As vLLM names its attention, ``"model.layers.3.self_attn.attn"``.
        index: Its place in the stack; ``None`` where its name has none.
        options: The settings.
        excluded: See `excluded_layers`.
    """
    if index in excluded:
        return Reason.EXCLUDED
    if options.calibration is None:
        return options.selector
    module = name.removesuffix(".attn")
    for known, setting in options.calibration.layers.items():
        if module == known or module.endswith("." + known) or known.endswith("." + module):
            return setting if isinstance(setting, Selector) else Reason.CALIBRATED
    return Reason.CALIBRATED


def local_setting(setting: Selector | Reason, shard: HeadShard, q_heads: int) -> Selector | Reason:
    """A layer's setting for the query heads that a rank holds.

    Args:
        setting: That of all heads.
        shard: Which of the tensor parallel ranks this is.
        q_heads: Query heads of the layer on it.

    Raises:
        ValueError: The selector has numbers for more heads than the layer, or fewer.
    """
    if isinstance(setting, Reason):
        return setting
    found = shard_selector(setting, shard)
    for name in PER_HEAD:
        numbers = getattr(found, name, None)
        if numbers is not None and len(numbers) != q_heads:
            raise ValueError(
                f"{name} must have a number for each of {q_heads * shard.count} query heads, got "
                f"{len(numbers) * shard.count}; calibrate this model anew"
            )
    return found


def validate_calibration(
    options: Options, names: Sequence[str], config: Mapping[str, Any] | None = None
) -> None:
    """Refuses a calibration of another model; warns of one of more layers or other heads.

    Args:
        options: The settings.
        names: The layers, as vLLM names their attention.
        config: What the model's configuration says.

    Raises:
        ValueError: It names none of the layers.
    """
    if options.calibration is None or not names:
        return
    found = [setting_of(name, None, options, frozenset()) for name in names]
    if not any(isinstance(setting, Selector) for setting in found) and not any(
        _is_named(name, options) for name in names
    ):
        raise ValueError(
            f"calibration must name layers of the model, got none of {names[0]!r} and others; "
            "calibrate this model anew"
        )
    said = config or {}
    sizes = {n: size for n, size in options.calibration.sizes.items() if n in said}
    unlike = [f"{n}={said[n]} (it says {size})" for n, size in sizes.items() if said[n] != size]
    unnamed = [name for name in names if not _is_named(name, options)]
    if unnamed:
        layers = counted(len(unnamed), "layer")
        unlike.append(f"{unnamed[0]!r} and {layers} in all that it does not name")
    if unlike:
        logger.warning(
            "calibration must be of the model that is served, got one of %s for a model with %s; "
            "calibrate this model",
            options.calibration.model,
            ", ".join(unlike),
        )


def _is_named(name: str, options: Options) -> bool:
    assert options.calibration is not None
    module = name.removesuffix(".attn")
    return any(
        module == known or module.endswith("." + known) or known.endswith("." + module)
        for known in options.calibration.layers
    )


def refuse_layer(impl: Any, selector: Selector) -> Reason | None:
    """Why what vLLM's implementation of a layer computes is not plain attention, if it is not.

    Args:
        impl: vLLM's implementation.
        selector: Which blocks the layer would keep.
    """
    if impl.attn_type != "decoder":
        return Reason.NOT_DECODER
    if getattr(impl, "kv_sharing_target_layer_name", None) is not None:
        return Reason.SHARED_CACHE
    # 0 and None mean none, or a window that reaches nowhere: -1 by itself or as a pair.
    if getattr(impl, "sliding_window", None) not in (None, -1, (-1, -1)):
        return Reason.SLIDING_WINDOW
    if getattr(impl, "chunk_lookback", -1) != -1:
        return Reason.SLIDING_WINDOW
    if getattr(impl, "alibi_slopes", None) is not None:
        return Reason.ALIBI
    if getattr(impl, "logits_soft_cap", None):
        return Reason.SOFT_CAP
    if getattr(impl, "sinks", None) is not None:
        return Reason.SINKS
    if impl.kv_cache_dtype not in FLOATING_CACHES:
        return Reason.QUANTIZED_CACHE
    # Chunks have fewer queries than keys.
    if not selector.supports(causal=True, masked=False, self_attention=False):
        return Reason.SELECTOR
    if isinstance(selector, UniSparse) and impl.num_heads // impl.num_kv_heads % selector.c_h:
        return Reason.HEADS
    return None


def refuse_engine(config: Any) -> Reason | None:
    """Why nothing of an engine runs sparse, from its ``VllmConfig``; ``None`` where some may."""
    parallel = config.parallel_config
    sizes = ("decode_context_parallel_size", "prefill_context_parallel_size")
    if any(getattr(parallel, name, 1) > 1 for name in sizes):
        return Reason.CONTEXT_PARALLEL
    if config.kv_transfer_config is not None:
        return Reason.KV_TRANSFER
    return None
