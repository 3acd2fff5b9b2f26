"""On CUDA: masks that a compiled graph is given are read, guarded, and left to a captured graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.api.reference import attend, rmse
from tests.api.test_masks_of_other_lengths import LENGTHS, Attend, arguments
from tests.gpu.test_cuda import BF16, BLOCKS, assert_attends, on_cuda
from unisparse_flex import UniSparse, optimize

pytestmark = pytest.mark.gpu

LENGTH, MOST = 1111, 1408


def causal(window: int | None = None) -> Tensor:
    position = torch.arange(MOST, device="cuda")
    mask = position <= position[:, None]
    return mask if window is None else mask & (position > position[:, None] - window)


class Kept(nn.Module):
    """Attention under a mask in a buffer."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", causal())

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = self.mask[: query.shape[2], : key.shape[2]]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


class Handed(nn.Module):
    """Attention under a mask that comes with the call."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


class Flagged(nn.Module):
    """The same call, causal by its flag."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_buffer_is_read_and_its_changes_are_noticed(mode: str | None) -> None:
    torch._dynamo.reset()
    model = optimize(Kept().cuda(), BLOCKS, min_length=0)
    flagged = torch.compile(optimize(Flagged(), BLOCKS, min_length=0), fullgraph=True)
    run = torch.compile(model, fullgraph=True, mode=mode)
    tensors = on_cuda(LENGTH)
    with torch.no_grad():
        for _ in range(4):
            output = run(*tensors).clone()
            assert output.equal(flagged(*tensors))
        model.mask.copy_(causal(600))
        for _ in range(4):
            output = run(*tensors).clone()
    # A window of so few blocks is kept whole.
    mask = causal(600)[:LENGTH, :LENGTH]
    exact = attend(*tensors, attn_mask=mask)
    assert rmse(output, exact) <= 2 * rmse(attend(*tensors, attn_mask=mask, dtype=BF16), exact)


def test_padding_that_comes_with_the_call_is_read() -> None:
    torch._dynamo.reset()
    run = torch.compile(optimize(Handed(), BLOCKS, min_length=0), fullgraph=True)
    query, key, value = on_cuda(LENGTH)
    for starts in ([0, 333], [129, 7]):
        first = torch.tensor(starts, device="cuda")[:, None]
        valid = torch.arange(LENGTH, device="cuda") >= first
        mask = (causal()[:LENGTH, :LENGTH] & valid[:, None])[:, None]
        with torch.no_grad():
            output = run(query, key, value, mask)
        for row, start in enumerate(starts):
            alone = tuple(t[row : row + 1, :, start:] for t in (query, key, value))
            assert_attends(output[row : row + 1, :, start:], alone, BLOCKS, offset=0)


def test_a_graph_that_is_captured_takes_the_masks_of_later_replays() -> None:
    torch._dynamo.reset()
    run = torch.compile(optimize(Handed(), BLOCKS, min_length=0), fullgraph=True)
    query, key, value = on_cuda(LENGTH)
    mask = causal()[:LENGTH, :LENGTH].clone()
    with torch.no_grad():
        # On the default stream it is read.
        run(query, key, value, mask)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run(query, key, value, mask)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run(query, key, value, mask)
        mask.copy_(causal(300)[:LENGTH, :LENGTH])
        graph.replay()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            expected = run(query, key, value, mask.clone())
        torch.cuda.synchronize()
    assert output.equal(expected)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "name",
    ["documents", "window of a tensor, made", "padding, made", "documents, made", "prefix, made"],
)
def test_a_compiled_call_is_right_at_a_second_length(name: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    plain, selector = Attend(name), UniSparse(top_p=1.0)
    run = torch.compile(
        optimize(Attend(name), selector, min_length=0), fullgraph=True, dynamic=dynamic
    )
    for length in LENGTHS:
        query, key, given = (tensor.cuda() for tensor in arguments(name, 2, length))
        with torch.no_grad():
            exact = plain(query.double(), key.double(), given)
            query, key = query.to(BF16), key.to(BF16)
            found, dense = run(query, key, given), plain(query, key, given)
        sees = exact.isfinite().all(-1)
        assert sees.float().mean() > 0.8
        assert rmse(found[sees], exact[sees]) <= 2 * rmse(dense[sees], exact[sees])
