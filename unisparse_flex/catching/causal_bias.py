"""What torch's `CausalBias` masks say, as flags."""

from __future__ import annotations

from dataclasses import replace

from torch.nn.attention.bias import CausalBias, CausalVariant

from ..passes.calls import SdpaCall


def resolve_causal_bias(call: SdpaCall) -> SdpaCall:
    """Replaces a `CausalBias` mask by the flags that say the same.

    One made for other lengths stays as it is.
    """
    bias = call.attn_mask
    if not isinstance(bias, CausalBias) or call.causal:
        return call
    if call.query.dim() < 2 or call.key.dim() < 2:
        return call
    if (bias.seq_len_q, bias.seq_len_kv) != (call.query.shape[-2], call.key.shape[-2]):
        return call
    lower_right = bias.variant is CausalVariant.LOWER_RIGHT
    return replace(call, attn_mask=None, is_causal=not lower_right, causal_lower_right=lower_right)
