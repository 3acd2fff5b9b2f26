"""Calls whose mask is a formula: the marker's own kernel, lowered ones, kept windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.api.models import FINE, qkv
from tests.api.reference import attend, rmse
from unisparse_flex import UniSparse
from unisparse_flex.block_masks import BlockGeometry
from unisparse_flex.block_masks.masks import MaskProgram
from unisparse_flex.passes import SparseConfig
from unisparse_flex.passes.attend.marker import marked_sdpa
from unisparse_flex.passes.attend.sparse_attention import WINDOW_BLOCKS, keeps_window, select
from unisparse_flex.passes.calls.sdpa import SdpaCall
from unisparse_flex.passes.decision.refusals import flex_lowers

from .graphs import Stripes

Q_LEN, KV_LEN = 90, 150
BEHIND = KV_LEN - Q_LEN
WHOLE = UniSparse(block_size=16, c_q=4, c_k=4, top_p=1.0)
MASKS = {
    "causal at an offset": f"kv <= q + {BEHIND - 20}",
    "window": "(kv <= q + n0) & (q + n0 < kv + 300)",
    "narrow window": "(kv <= q + n0) & (q + n0 < kv + 40)",
    "padded": "(kv <= q + n0) & (t0[b, kv])",
    "documents": "(kv <= q + n0) & (t1[b, q + n0] == t1[b, kv])",
    "prefix": "(kv <= q + n0) | (kv < t2[b])",
    "chunks": "(kv <= q + n0) & ((q + n0) // 32 == kv // 32)",
}


def masked_call(name: str) -> SdpaCall:
    query, key, value = qkv(Q_LEN, KV_LEN, batch=2)
    padding = torch.ones(2, KV_LEN, dtype=torch.bool)
    padding[1, :37] = False
    documents = (torch.arange(KV_LEN) // 45)[None].expand(2, -1).contiguous()
    return SdpaCall(
        query=query,
        key=key,
        value=value,
        enable_gqa=True,
        mask=MASKS[name],
        mask_tensors=[padding, documents, torch.tensor([70, 3])],
        mask_numbers=[BEHIND],
    )


def pairs(call: SdpaCall) -> Tensor:
    program = call.mask_program()
    assert program is not None
    return program.pairs(torch.arange(Q_LEN), torch.arange(KV_LEN))


def defined(call: SdpaCall, config: SparseConfig) -> Tensor:
    mask = select(call, config).token_mask() & pairs(call)
    return attend(call.query, call.key, call.value, attn_mask=mask)


@pytest.mark.parametrize("selector", [FINE, WHOLE, Stripes(columns=(0, 2))], ids=repr)
@pytest.mark.parametrize("name", list(MASKS))
def test_the_markers_own_kernel_applies_the_formula(name: str, selector: Any) -> None:
    call, config = masked_call(name), SparseConfig(selector=selector)
    output = marked_sdpa(call, config.encode())
    assert rmse(output, defined(call, config)) < 1e-6
    if selector is WHOLE:
        exact = attend(call.query, call.key, call.value, attn_mask=pairs(call))
        assert rmse(output, exact) < 1e-6


@pytest.mark.parametrize("name", list(MASKS))
def test_a_call_that_stays_dense_applies_the_formula(name: str) -> None:
    call = masked_call(name)
    output = marked_sdpa(call, SparseConfig(selector=FINE, dense=True).encode())
    exact = attend(call.query, call.key, call.value, attn_mask=pairs(call))
    assert rmse(output, exact) < 1e-6


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("flag", ["is_causal", "causal_lower_right"])
def test_a_formula_says_itself_what_is_causal(flag: str, dense: bool) -> None:
    flags: dict[str, Any] = {flag: True}
    call = replace(masked_call("padded"), **flags)
    with pytest.raises(ValueError, match="mask must say itself what is causal"):
        marked_sdpa(call, SparseConfig(selector=FINE, dense=dense).encode())


@pytest.mark.parametrize("name", ["narrow window", "documents"])
def test_the_markers_own_kernel_is_right_at_symbolic_lengths(name: str) -> None:
    call, config = masked_call(name), SparseConfig(selector=FINE)
    text = config.encode()

    def run(query: Tensor, key: Tensor, value: Tensor, tensors: list[Tensor]) -> Tensor:
        return torch.ops.unisparse.sdpa(
            query,
            key,
            value,
            enable_gqa=True,
            mask=call.mask,
            mask_tensors=tensors,
            mask_numbers=[key.shape[2] - query.shape[2]],
            config=text,
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", dynamic=True, fullgraph=True)
    output = compiled(call.query, call.key, call.value, list(call.mask_tensors or ()))
    assert rmse(output, defined(call, config)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [("window", False), ("window", True), ("chunks", False)],
)
def test_a_formula_without_tensors_compiles_at_fixed_and_symbolic_numbers(
    name: str, dynamic: bool
) -> None:
    call, config = masked_call(name), SparseConfig(selector=FINE)

    def marked(query: Tensor, key: Tensor, value: Tensor, past: Tensor) -> Tensor:
        return torch.ops.unisparse.sdpa(
            query,
            key,
            value,
            enable_gqa=True,
            mask=call.mask,
            mask_numbers=[past.shape[0]],
            config=text,
        )

    text = config.encode()
    assert flex_lowers(replace(call, mask_tensors=None))
    torch._dynamo.reset()
    with torch.no_grad():
        output = torch.compile(marked, fullgraph=True, dynamic=dynamic)(
            call.query, call.key, call.value, torch.empty(BEHIND)
        )
    assert rmse(output, defined(call, config)) < 1e-6


@pytest.mark.parametrize(
    ("blocks", "kept"), [(WINDOW_BLOCKS - 2, True), (WINDOW_BLOCKS - 1, False)]
)
def test_a_window_of_few_blocks_is_kept_whole(blocks: int, kept: bool) -> None:
    window = blocks * 16
    program = MaskProgram.parse(f"(kv <= q) & (q < kv + {window})", batch=1, q_len=400, kv_len=400)
    offset, rest = program.split_causal()
    geometry = BlockGeometry(q_len=400, kv_len=400, block_size=16, causal_offset=offset, mask=rest)
    assert keeps_window(geometry) is kept
    query, key, value = qkv(400)
    call = SdpaCall(query=query, key=key, value=value, enable_gqa=True, mask=program.text)
    selection = select(call, SparseConfig(selector=FINE))
    assert (selection.density() == 1.0) is kept
    most = int(selection.keep.sum(-1).max())
    assert not kept or most <= WINDOW_BLOCKS
