"""`torch.ops.unisparse.context_sdpa`: an attention call over a sequence that ranks share.

Each rank holds some of the tokens. Graphs hold the call as one operator; what runs is registered
by name, as this layer knows nothing of groups of processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..calls import SdpaCall, SparseConfig
from ..decision import needs_grad
from .sparse_attention import apply_autocast

# Gets the local call, its settings, the pieces of the keys (empty for one piece), and why this rank
# refuses the call (empty where it does not): the others are to know.
ContextAttention = Callable[[SdpaCall, SparseConfig, tuple[int, ...], str], Tensor]
_contexts: dict[str, ContextAttention] = {}

_library = torch.library.Library("unisparse", "FRAGMENT")
_library.define(
    "context_sdpa(Tensor query, Tensor key, Tensor value, *, bool is_causal, "
    "bool causal_lower_right, float? scale, int[] pieces, str config, str refusal) -> Tensor",
    # What it exchanges depends on the data, so the host waits for it.
    tags=(torch.Tag.cudagraph_unsafe,),
)


def register_context(name: str, attend: ContextAttention) -> None:
    """Makes settings with ``context=name`` run ``attend``."""
    _contexts[name] = attend


def context_sdpa(call: SdpaCall, config: SparseConfig, pieces: tuple[int, ...] = ()) -> Tensor:
    """Runs or records the operator for a call whose tokens are some of the sequence's.

    Args:
        call: query [B, Hq, Sq / R, D], key [B, Hkv, Skv / R, D], value [B, Hkv, Skv / R, Dv].
        config: Settings with a ``context``.
        pieces: Tokens of each piece of the keys; empty for one piece.

    Raises:
        NotImplementedError: When it runs: a mask, dropout, or a call that needs a gradient.
    """
    refusal = _refuse(call)
    if refusal:
        call = call.map_tensors(Tensor.detach)
    call = apply_autocast(call)
    return torch.ops.unisparse.context_sdpa(
        call.query,
        call.key,
        call.value,
        is_causal=call.is_causal,
        causal_lower_right=call.causal_lower_right,
        scale=call.scale,
        pieces=list(pieces),
        config=config.encode(),
        refusal=refusal,
    )


def _refuse(call: SdpaCall) -> str:
    """Why a call cannot be shared whatever the others say; empty where it can."""
    masked = call.attn_mask is not None or bool(call.mask)
    if not (masked or call.dropout_p != 0.0 or needs_grad(call)):
        return ""
    found = "attn_mask" if masked else "dropout_p" if call.dropout_p else "requires_grad"
    return (
        "context parallel attention must have no attn_mask, no dropout and no gradient "
        f"(causality is a flag), got {found}; let the model build no mask and run under "
        "torch.no_grad()"
    )


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    causal_lower_right: bool,
    scale: float | None,
    pieces: list[int],
    config: str,
    refusal: str,
) -> Tensor:
    settings = SparseConfig.decode(config)
    assert settings.context is not None
    if settings.context not in _contexts:
        raise RuntimeError(
            f"context {settings.context!r} must be made in this process, got none; optimize the "
            "model with a ContextParallel of this process"
        )
    call = SdpaCall(
        query=query,
        key=key,
        value=value,
        is_causal=is_causal,
        causal_lower_right=causal_lower_right,
        scale=scale,
        enable_gqa=True,
    )
    return _contexts[settings.context](call, settings, tuple(pieces), refusal)


def _describe(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


_library.impl("context_sdpa", _run, "CompositeExplicitAutograd")
torch.library.register_fake("unisparse::context_sdpa", _describe, lib=_library)
