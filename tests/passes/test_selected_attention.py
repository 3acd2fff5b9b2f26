"""Attention to a selection made before, compiled and not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.api.models import FINE, qkv
from unisparse_flex.block_masks import BlockGeometry
from unisparse_flex.block_masks.scoring import default_scale
from unisparse_flex.passes.attend.selected_attention import attend_selected
from unisparse_flex.passes.calls.sdpa import SdpaCall


@pytest.mark.parametrize("offset", [None, 0, 48], ids=["whole", "first_rows", "later_rows"])
def test_a_compiled_kernel_attends_as_masked_attention_does(offset: int | None) -> None:
    query, key, value = qkv(100, 203)
    geometry = BlockGeometry(
        q_len=100, kv_len=203, block_size=16, causal_offset=offset, rows_before=offset or 0
    )
    selection = FINE.compute_selection(
        query, key, geometry=geometry, scale=default_scale(16), attn_mask=None
    )
    call = SdpaCall(query=query, key=key, value=value, enable_gqa=True)
    with torch.no_grad():
        expected = attend_selected(call, selection, compiled=False)
        output = attend_selected(call, selection, compiled=True)
        everything = replace(selection, keep=selection.visible.expand_as(selection.keep))
        dense = attend_selected(call, everything, compiled=False)
    assert (output - expected).abs().max() < 1e-5
    assert (dense - expected).abs().max() > 0.1
