"""On CUDA: masks proved from the graph, repeated heads and multi-head modules, compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.api.models import tokens
from tests.api.reference import attend, rmse
from tests.gpu.test_cuda import BF16, BLOCKS, FP32, assert_attends, on_cuda
from unisparse_flex import UniSparse, attention, optimize
from unisparse_flex.block_masks import kernels, masks
from unisparse_flex.block_masks.kernels import mask_reading
from unisparse_flex.passes.attend import mask_contents

pytestmark = pytest.mark.gpu

Mask = Callable[[Tensor, Tensor], Tensor]


def position(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[-1], device=ids.device)


def causal(ids: Tensor) -> Tensor:
    return position(ids) <= position(ids)[:, None]


MASKS: dict[str, Mask] = {
    "causal": lambda ids, _: causal(ids),
    "padded": lambda ids, valid: (causal(ids) & valid[:, None, :])[:, None],
    "sliding": lambda ids, _: causal(ids) & (position(ids) > position(ids)[:, None] - 600),
    "narrow": lambda ids, _: causal(ids) & (position(ids) > position(ids)[:, None] - 100),
    "documents": lambda ids, _: (causal(ids) & (ids[:, :, None] == ids[:, None, :]))[:, None],
}


class Masked(nn.Module):
    """Grouped heads repeated, and a mask made inside the graph."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(ids, valid))


@pytest.mark.parametrize("dynamic", [False, None, True])
@pytest.mark.parametrize("name", MASKS)
def test_a_proved_mask_is_exact(name: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    # Small blocks: a window of few of them is kept whole.
    selector = UniSparse.paper(block_size=32, top_p=0.6) if name == "sliding" else BLOCKS
    model = optimize(Masked(MASKS[name]), selector, min_length=0)
    run = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for length in (1111,) if dynamic is False else (1111, 1408):
        # float32 where kernels and definition would round composites in their own ways.
        query, key, value = on_cuda(length, dtype=FP32 if name == "sliding" else BF16)
        ids = (torch.arange(length, device="cuda") // 300).expand(2, -1)
        first = torch.tensor([0, 333], device="cuda")[:, None]
        valid = torch.arange(length, device="cuda") >= first
        with torch.no_grad():
            output = run(query, key, value, ids, valid)
        mask = MASKS[name](ids, valid)
        if name == "narrow":
            exact = attend(query, key, value, attn_mask=mask)
            plain = attend(query, key, value, attn_mask=mask, dtype=BF16)
            assert rmse(output, exact) <= 2 * rmse(plain, exact)
        elif name == "padded":
            # Blocks are counted from a row's own first token.
            for row, start in enumerate(first[:, 0].tolist()):
                alone = tuple(t[row : row + 1, :, start:] for t in (query, key, value))
                assert_attends(output[row : row + 1, :, start:], alone, selector, offset=0)
                assert not output[row, :, :start].any()
        else:
            # What is proved causal is scored as such, by kernels that round in their own way.
            options = {"offset": 0} if name == "causal" else {"attn_mask": mask}
            assert_attends(output, (query, key, value), selector, **options)


@pytest.mark.parametrize("additive", [False, True])
def test_an_eager_call_reads_its_mask(additive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    read = kernels.read_mask

    def count(*args: Any, **options: Any) -> Any:
        nonlocal reads
        reads += 1
        return read(*args, **options)

    monkeypatch.setattr(mask_contents, "read_mask", count)
    for length in (1111, 1408):
        query, key, value = on_cuda(length)
        first = torch.tensor([0, 333], device="cuda")[:, None]
        valid = torch.arange(length, device="cuda") >= first
        mask = MASKS["padded"](valid, valid)
        if additive:
            lowest = torch.finfo(BF16).min
            mask = torch.zeros(mask.shape, dtype=BF16, device="cuda").masked_fill(~mask, lowest)
        reads = 0
        for _ in range(2):
            output = attention(query, key, value, mask, enable_gqa=True, selector=BLOCKS)
        assert reads == 1
        for row, start in enumerate(first[:, 0].tolist()):
            alone = tuple(t[row : row + 1, :, start:] for t in (query, key, value))
            assert_attends(output[row : row + 1, :, start:], alone, BLOCKS, offset=0)
            assert not output[row, :, :start].any()


@pytest.mark.parametrize("width", [100, 600])
def test_an_eager_window_is_right(width: int) -> None:
    tensors = on_cuda(1408, dtype=FP32)
    position = torch.arange(1408, device="cuda")
    mask = causal(position[None]) & (position > position[:, None] - width)
    output = attention(*tensors, mask, enable_gqa=True, selector=UniSparse.paper(top_p=1.0))
    assert rmse(output, attend(*tensors, attn_mask=mask)) < 1e-3


def test_a_mask_of_ones_is_no_mask() -> None:
    tensors = on_cuda(1408)
    mask = causal(torch.zeros(1, 1408, device="cuda"))
    masked = attention(*tensors, mask, enable_gqa=True, selector=BLOCKS)
    assert masked.equal(attention(*tensors, is_causal=True, enable_gqa=True, selector=BLOCKS))


def test_an_encoder_is_rewritten() -> None:
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().cuda().to(BF16)
    x = tokens(2, 1000, 128, dtype=BF16).cuda()
    everything = UniSparse.paper(top_p=1.0)
    optimized = optimize(copy.deepcopy(model), everything, min_length=0)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        output = torch.compile(optimized, fullgraph=True)(x)
        assert rmse(output, exact) <= 2 * rmse(model(x), exact)


@pytest.mark.parametrize("dtype", [torch.bool, BF16, FP32, torch.float16])
@pytest.mark.parametrize("length", [1, 129, 1111, 4096])
def test_the_kernels_read_what_operators_do(length: int, dtype: torch.dtype) -> None:
    row = torch.arange(length, device="cuda")
    causal = row <= row[:, None]
    ids = row * 7 // (length + 1)
    first = torch.tensor([0, length // 3, length - 1], device="cuda")[:, None]
    valid = (row >= first)[:, None, None]
    cases = {
        "causal": causal,
        "padding": causal & valid,
        "padding on the right": causal & valid.flip(-1),
        "padded encoder": valid,
        "documents": causal & (ids == ids[:, None]),
        "window": causal & (row[:, None] - row < 300),
        "in pieces": causal & (row % 2 == row[:, None] % 2),
        "strided": causal[::2, ::2],
        "nothing": torch.zeros_like(causal),
    }
    for name, seen in cases.items():
        mask = seen
        if dtype is not torch.bool:
            lowest = torch.finfo(dtype).min
            mask = torch.zeros(seen.shape, dtype=dtype, device="cuda").masked_fill(~seen, lowest)
        q_len = length if name == "padded encoder" else mask.shape[-2]
        sizes = {"q_len": q_len, "kv_len": mask.shape[-1]}
        expected = masks.read_mask(mask, **sizes)
        for _ in range(2):
            found = kernels.read_mask(mask, **sizes)
            if expected is None or found is None:
                assert found is expected, name
                continue
            assert found.text == expected.text, name
            assert found.causal_offset == expected.causal_offset, name
            for ours, theirs in zip(found.tensors, expected.tensors, strict=True):
                assert ours.equal(theirs), name


def test_this_gpu_reads_and_turns_masks_as_pytorch_does() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert not mask_reading.find_reading_failure(device)
