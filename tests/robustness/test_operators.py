"""Every operator that is registered passes torch's own checks of operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.api.models import qkv
from unisparse_flex import UniSparse
from unisparse_flex.block_masks.kernels import settings_of
from unisparse_flex.block_masks.kernels.settings import encode_settings
from unisparse_flex.block_masks.pages import DecodeSelector, UnitSummaries, summarize_rows
from unisparse_flex.passes import SparseConfig
from unisparse_flex.passes.attend.shared_tokens import register_context
from unisparse_flex.passes.calls.sdpa import SdpaCall

SELECTOR = UniSparse(block_size=16, c_q=4, c_k=4, top_k=1, last_query_blocks=0)
CONFIGS = {
    "sparse": SparseConfig(selector=SELECTOR),
    "dense": SparseConfig(selector=SELECTOR, dense=True),
}
MASKS: dict[str, Tensor | None] = {
    "none": None,
    "bool": torch.ones(40, 40, dtype=torch.bool).tril(),
    "float": torch.zeros(1, 4, 1, 40),
}
# Everything that opcheck knows.
FAKE = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL = (*FAKE, "test_aot_dispatch_static", "test_aot_dispatch_dynamic")


def check(operator: Any, *args: Any, **kwargs: Any) -> None:
    found = torch.library.opcheck(operator, args, kwargs, test_utils=ALL)
    assert found == dict.fromkeys(ALL, "SUCCESS")


def test_the_operators_are_those_that_are_checked_here() -> None:
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("unisparse::")}
    operators = (
        *("sdpa", "contiguous", "select_blocks", "key_intervals", "context_sdpa"),
        *("sdpa_at_run", "sdpa_at_run_backward", "summarize_rows"),
        *("choose_rows", "pin_rows"),
    )
    assert names == {f"unisparse::{name}" for name in operators}


@pytest.mark.parametrize("mask", MASKS)
# Of torch 2.14's own opcheck, which looks at the gradient of its copies.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_marker(config: str, mask: str, requires_grad: bool) -> None:
    tensors = [t.requires_grad_(requires_grad) for t in qkv(40)]
    check(
        torch.ops.unisparse.sdpa.default,
        *tensors,
        MASKS[mask],
        enable_gqa=True,
        config=CONFIGS[config].encode(),
    )


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_what_decides_when_it_runs(config: str, requires_grad: bool) -> None:
    tensors = [t.requires_grad_(requires_grad) for t in qkv(40)]
    options: tuple[Any, ...] = (
        None,
        0.0,
        True,
        None,
        True,
        False,
        "",
        [],
        [],
        CONFIGS[config].encode(),
    )
    check(torch.ops.unisparse.sdpa_at_run.default, *tensors, *options)
    if not requires_grad:
        grad = torch.ones_like(tensors[0])
        check(torch.ops.unisparse.sdpa_at_run_backward.default, grad, *tensors, *options)


def test_the_marker_of_a_proved_mask() -> None:
    check(
        torch.ops.unisparse.sdpa.default,
        *qkv(40),
        enable_gqa=True,
        mask="kv <= q",
        mask_tensors=[],
        mask_numbers=[],
        config=CONFIGS["sparse"].encode(),
    )


@pytest.mark.parametrize("causal_lower_right", [False, True])
def test_the_marker_of_a_causal_call(causal_lower_right: bool) -> None:
    check(
        torch.ops.unisparse.sdpa.default,
        *qkv(40, 60),
        is_causal=not causal_lower_right,
        enable_gqa=True,
        causal_lower_right=causal_lower_right,
        config=CONFIGS["sparse"].encode(),
    )


def test_a_call_whose_tokens_ranks_share() -> None:
    # One rank has them all.
    def attend(call: SdpaCall, config: SparseConfig, pieces: tuple[int, ...], _: str) -> Tensor:
        return F.scaled_dot_product_attention(
            call.query, call.key, call.value, is_causal=True, enable_gqa=True
        )

    register_context("alone", attend)
    # It has no gradient: whoever needs one is refused before.
    found = torch.library.opcheck(
        torch.ops.unisparse.context_sdpa.default,
        qkv(40),
        {
            "is_causal": True,
            "causal_lower_right": False,
            "scale": None,
            "pieces": [],
            "config": SparseConfig(selector=SELECTOR, context="alone").encode(),
            "refusal": "",
        },
        test_utils=ALL,
    )
    assert found == dict.fromkeys(ALL, "SUCCESS")


def test_copies_that_keep_their_strides() -> None:
    whole = torch.arange(24).view(2, 3, 4)
    check(torch.ops.unisparse.contiguous.default, [whole.mT, whole[..., ::2], whole[:0], whole])


@pytest.mark.parametrize(
    ("mask", "tensors", "numbers"),
    [
        ("t0[b, kv]", [torch.arange(100) >= torch.tensor([[0], [60]])], []),
        ("(t0[kv]) & (-n0 < kv - q)", [torch.arange(100) % 7 > 0], [30]),
        ("kv <= q + 20", [], []),
    ],
)
@pytest.mark.parametrize("causal_offset", [None, 40])
@pytest.mark.parametrize("sampled_queries", [0, 2])
def test_the_tables_of_a_mask_of_intervals(
    sampled_queries: int,
    causal_offset: int | None,
    mask: str,
    tensors: list[Tensor],
    numbers: list[int],
) -> None:
    check(
        torch.ops.unisparse.key_intervals.default,
        mask,
        tensors,
        numbers,
        batch=2,
        q_len=60,
        kv_len=100,
        causal_offset=causal_offset,
        block_size=16,
        c_q=4,
        c_k=4,
        sampled_queries=sampled_queries,
        sink_blocks=1,
        last_query_blocks=1,
        device=torch.device("cpu"),
    )


def rows_of_a_cache(device: str) -> tuple[Tensor, UnitSummaries, Tensor]:
    keys = torch.randn(2, 2, 128, 16, generator=torch.Generator().manual_seed(0)).to(device)
    lengths = torch.full((2,), 100, dtype=torch.int32, device=device)
    return keys, UnitSummaries.create(keys, 16), lengths


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_summaries_of_rows(device: str, rows: int) -> None:
    keys, units, lengths = rows_of_a_cache(device)
    check(
        torch.ops.unisparse.summarize_rows.default,
        *(keys, torch.tensor(100, device=device), rows, 16),
        *(lengths, units.numbers, units.scales),
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_choice_for_rows(device: str) -> None:
    keys, units, lengths = rows_of_a_cache(device)
    summarize_rows(keys, units, lengths, torch.tensor(100, device=device), 100)
    query = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1)).to(device)
    order = torch.arange(2, dtype=torch.int32, device=device)[:, None]
    counter = torch.zeros(2, dtype=torch.int64, device=device)
    selector = DecodeSelector(budget=32, min_keys=0, unit=16, last_keys=16).text
    # What follows the units that are read says nothing.
    utils = ALL if device == "cpu" else FAKE
    found = torch.library.opcheck(
        torch.ops.unisparse.choose_rows.default,
        (query, units.numbers, units.scales, units.pinned, order, lengths, counter, selector, 0.3),
        test_utils=utils,
    )
    assert found == dict.fromkeys(utils, "SUCCESS")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_pins_of_rows(device: str) -> None:
    keys, units, lengths = rows_of_a_cache(device)
    query = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(1)).to(device)
    selector = DecodeSelector(share=0.5, min_keys=0, unit=16, last_keys=16).text
    check(
        torch.ops.unisparse.pin_rows.default,
        *(query, keys, lengths, units.pinned, selector, 0.3),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("causal_offset", [None, 0, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_selection_by_kernels(dtype: torch.dtype, causal_offset: int | None) -> None:
    query, key, _ = (t.to("cuda", dtype) for t in qkv(300, 400, head_dim=64))
    selector = UniSparse(block_size=64, c_q=8, c_k=8, top_p=0.9)
    settings = encode_settings(*settings_of(selector))
    found = torch.library.opcheck(
        torch.ops.unisparse.select_blocks.default,
        (query, key, 0.125, settings, causal_offset),
        test_utils=FAKE,
    )
    assert found == dict.fromkeys(FAKE, "SUCCESS")
