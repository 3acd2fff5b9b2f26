"""A GPU of a kind that nobody measured proves its attention: a first output beside PyTorch's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calls import SdpaCall, SparseConfig
from ..decision import attention_failure, needs_grad, needs_proof, prove_attention
from .sparse_attention import apply_autocast, attend_masked, select

# Rows that are compared, in the middle of the prompt: the last block's may keep everything.
ROWS = 16
# Root mean square, relative: three times what 16 bits were seen to make, a wrong block makes more.
LARGEST_ERROR = 0.03


def proved(output: Tensor, call: SdpaCall, config: SparseConfig) -> Tensor:
    """The output of an eager call that a compiled kernel made, or dense attention's.

    The first causal call without a mask of a kind of GPU and dtype is compared, in milliseconds;
    what was found is remembered, and calls that follow one that failed are refused.
    """
    device, dtype = call.query.device, call.query.dtype
    if not needs_proof(device) or attention_failure(device, dtype) is not None:
        return output
    if call.attn_mask is not None or call.mask or not call.causal or needs_grad(call):
        return output
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return output
    failed = prove_attention(device, dtype, lambda: find_difference(output, call, config))
    return call.run_dense() if failed else output


@torch.no_grad()
def find_difference(output: Tensor, call: SdpaCall, config: SparseConfig) -> str:
    """How an output differs from masked attention to the same blocks; empty where it does not."""
    call = apply_autocast(call)
    selection = select(call, config)
    geometry = selection.geometry
    last = min(max(geometry.q_len // 2, ROWS), geometry.q_len)
    rows = slice(max(last - ROWS, 0), last)
    keys = slice(0, geometry.num_visible_keys(last))
    expected = attend_masked(call, selection, rows, keys).float()
    difference = output[:, :, rows].float() - expected
    error = float(difference.square().mean().sqrt() / expected.square().mean().sqrt())
    # Not a number is a difference too.
    if error <= LARGEST_ERROR:
        return ""
    return f"rows {rows.start} to {last - 1} of {geometry.q_len} are off by {error:.1%}"
