"""On CUDA: under masks of intervals the kernels select what the definition selects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_intervals import MaskedCall, assert_selects
from unisparse_flex.block_masks import BlockGeometry, kernels
from unisparse_flex.block_masks.kernels.mask_tables import tables_of_mask
from unisparse_flex.block_masks.key_intervals import interval_tables
from unisparse_flex.block_masks.masks import MaskProgram
from unisparse_flex.block_masks.scoring import default_scale

from .test_cuda_kernels import BF16, FP32, cuda_call, needs_kernels, tokens_of  # noqa: F401

pytestmark = pytest.mark.gpu

LENGTH, BATCH = 1900, 3
NAMES = (
    *("ones", "padded left", "padded right", "holes", "window", "window, padded", "first keys"),
    *("documents", "prefix", "images", "no rows"),
)
RULES: tuple[dict[str, Any], ...] = (
    {"top_k": 5},
    {"top_p": 0.8},
    {"threshold": 0.05},
    {"top_p": 0.7, "threshold": 0.05, "threshold_blocks": 8},
)


def cases() -> dict[str, tuple[str, tuple[Tensor, ...]]]:
    key = torch.arange(LENGTH, device="cuda")
    padding = torch.tensor([[0], [700], [1333]], device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    holes = torch.rand((BATCH, LENGTH), device="cuda", generator=generator) < 0.7
    starts = key // 300 * 300
    ids = (torch.rand((BATCH, LENGTH), device="cuda", generator=generator) < 0.004).cumsum(-1)
    images = ids.masked_fill(ids % 3 > 0, -1)
    return {
        "ones": ("t0[b, kv]", (torch.ones_like(holes),)),
        "padded left": ("t0[b, kv]", (key >= padding,)),
        "padded right": ("t0[b, kv]", (key < LENGTH - padding,)),
        "holes": ("t0[b, kv]", (holes,)),
        "window": ("-500 < kv - q", ()),
        "window, padded": ("(-300 < kv - q) & (t0[b, kv])", (key >= padding,)),
        "first keys": ("t0[q] <= kv", (starts,)),
        "documents": ("t0[b, q] == t0[b, kv]", (ids,)),
        "prefix": ("(kv <= q) | (kv < t0[b, 0])", (padding,)),
        "images": ("(kv <= q) | ((t0[b, q] == t0[b, kv]) & (0 <= t0[b, kv]))", (images,)),
        "no rows": ("t0[b, q]", (torch.zeros_like(holes),)),
    }


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", NAMES)
def test_the_operator_selects_by_what_pairs_are_visible(name: str, dtype: torch.dtype) -> None:
    text, tensors = cases()[name]
    for index, rule in enumerate(RULES):
        options = {"c_k": 128, "c_q": 16, "sampled_queries": 4} if index % 2 else {}
        options["causal"] = name not in ("prefix", "images")
        call = cuda_call(LENGTH, batch=BATCH, dtype=dtype, seed=index, **rule, **options)
        masked = MaskedCall(call=call, text=text, tensors=tensors, device=torch.device("cuda"))
        query, key = tokens_of(call)
        geometry, selector = masked.geometry, call.selector
        assert kernels.obstacle(query, key, geometry, 1.0) is None
        lists = kernels.select_lists(
            query,
            key,
            kernels.settings_of(selector),
            geometry=geometry,
            scale=default_scale(query.shape[3]),
        )
        assert_selects(masked, lists, query, key)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_tables_are_those_of_plain_pytorch(name: str, causal: bool) -> None:
    text, tensors = cases()[name]
    geometry = BlockGeometry(
        q_len=LENGTH, kv_len=LENGTH, block_size=128, causal_offset=0 if causal else None
    )
    options = {
        **{"c_q": 16, "c_k": 64, "sampled_queries": 4},
        **{"sink_blocks": 2, "last_query_blocks": 2},
    }
    device = torch.device("cuda", torch.cuda.current_device())
    program = MaskProgram.parse(text, tensors=tensors, batch=BATCH, q_len=LENGTH, kv_len=LENGTH)
    expected = interval_tables(replace(geometry, mask=program), device, **options).tensors()

    def make() -> list[Tensor]:
        return tables_of_mask(
            text, tensors, (), geometry=geometry, batch=BATCH, device=device, **options
        )

    found = [make(), make()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found.append(make())
    graph.replay()
    for tables in found:
        assert all(ours.equal(theirs) for ours, theirs in zip(tables, expected, strict=True))
