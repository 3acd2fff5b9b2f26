"""On CUDA: eager and compiled attention against the definition, training, memory, waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from tests.api.models import SELECTOR, create, embeddings, qkv
from tests.api.reference import assert_is_sparse, attend, rmse
from unisparse_flex import UniSparse, attention, explain, optimize
from unisparse_flex.block_masks import BlockGeometry
from unisparse_flex.passes import DenseReason
from unisparse_flex.reports import record_attention

from .waiting import never_waiting

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = [(BF16, 64, 128), (FP16, 128, 64), (FP32, 64, 32), (BF16, 64, 16)]
BLOCKS = UniSparse.paper(block_size=128, top_p=0.6)
LONG = 32768


class Sdpa(nn.Module):
    """One causal call with grouped heads."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def on_cuda(
    q_len: int,
    kv_len: int | None = None,
    *,
    dtype: torch.dtype = BF16,
    head_dim: int = 64,
    batch: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv(q_len, kv_len, batch=batch, head_dim=head_dim, dtype=dtype)
    return query.cuda(), key.cuda(), value.cuda()


def assert_attends(output: Tensor, tensors: Any, selector: UniSparse, **options: Any) -> None:
    """Asserts that ``output`` errs no more than plain attention of its dtype, and is sparse."""
    exact = attend(*tensors, selector=selector, **options)
    plain = attend(*tensors, selector=selector, dtype=output.dtype, **options)
    assert output.dtype is tensors[0].dtype
    assert rmse(output, exact) <= 2 * rmse(plain, exact)
    assert rmse(output, attend(*tensors, **options)) > 1e-2


@pytest.mark.parametrize(("dtype", "head_dim", "block_size"), KINDS)
def test_eager_attention_is_right(dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    selector = UniSparse.paper(block_size=block_size, top_p=0.6)
    for length in (777, 1024, 1500):
        tensors = on_cuda(length, dtype=dtype, head_dim=head_dim)
        output = attention(*tensors, is_causal=True, enable_gqa=True, selector=selector)
        assert_attends(output, tensors, selector, offset=0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("dtype", "head_dim", "block_size"), [(BF16, 128, 64), (FP16, 64, 128)])
def test_a_compiled_model_is_right(
    dtype: torch.dtype, head_dim: int, block_size: int, dynamic: bool
) -> None:
    torch._dynamo.reset()
    selector = UniSparse.paper(block_size=block_size, top_p=0.6)
    model = optimize(Sdpa(), selector, min_length=512)
    run = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for length in (1000, 777, 2048) if dynamic else (1000,):
        tensors = on_cuda(length, dtype=dtype, head_dim=head_dim)
        assert_attends(run(*tensors), tensors, selector, offset=0)
    if dynamic:
        short = on_cuda(400, dtype=dtype, head_dim=head_dim)
        assert rmse(run(*short), attend(*short, offset=0)) < 2.0**-6


def test_a_compiled_transformer_is_right() -> None:
    torch._dynamo.reset()
    model, x = create().cuda(), embeddings(700, batch=2).cuda()
    optimized = optimize(create().cuda(), SELECTOR, min_length=0)
    with torch.no_grad():
        assert_is_sparse(torch.compile(optimized, fullgraph=True)(x), model, SELECTOR, x)


def test_every_batch_reads_its_own_blocks() -> None:
    # Lists of 4 heads x 22 x 22 blocks: Inductor pads the stride of such a batch.
    torch._dynamo.reset()
    selector = UniSparse.paper(block_size=32, top_p=0.6)
    run = torch.compile(optimize(Sdpa(), selector, min_length=0), fullgraph=True, dynamic=False)
    tensors = on_cuda(700, batch=3)
    assert_attends(run(*tensors), tensors, selector, offset=0)


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_other_backends_are_right(backend: str) -> None:
    torch._dynamo.reset()
    model = optimize(Sdpa(), BLOCKS, min_length=0)
    tensors = on_cuda(777)
    run = torch.compile(model, backend=backend, fullgraph=True)
    assert_attends(run(*tensors), tensors, BLOCKS, offset=0)


def test_force_eager_is_right() -> None:
    tensors = on_cuda(777)
    with torch.compiler.set_stance("force_eager"):
        output = attention(*tensors, is_causal=True, enable_gqa=True, selector=BLOCKS)
    assert_attends(output, tensors, BLOCKS, offset=0)


def test_queries_at_the_end_of_the_keys_are_right_at_every_offset() -> None:
    for q_len, kv_len in ((640, 641), (640, 767), (500, 1023), (129, 1500)):
        tensors = on_cuda(q_len, kv_len)
        bias: Any = causal_lower_right(q_len, kv_len)
        output = attention(*tensors, attn_mask=bias, enable_gqa=True, selector=BLOCKS)
        assert_attends(output, tensors, BLOCKS, offset=kv_len - q_len)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_hold_within_the_kept_blocks(kind: str) -> None:
    for length in (777, 1024):
        causal = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
        row = torch.arange(length, device="cuda")
        # With holes, so that no formula says it.
        mask = causal & ~causal.tril(-500) & ((row[:, None] + row) % 7 != 3)
        if kind == "float":
            position = torch.arange(length, device="cuda")
            slopes = torch.tensor([0.001, 0.002, 0.004, 0.008], device="cuda")
            bias = -(position[:, None] - position).abs() * slopes[:, None, None]
            mask = bias.bfloat16().masked_fill(~mask, torch.finfo(BF16).min)
        tensors = on_cuda(length)
        output = attention(*tensors, attn_mask=mask, enable_gqa=True, selector=BLOCKS)
        assert_attends(output, tensors, BLOCKS, attn_mask=mask)


def test_everything_kept_is_dense_attention() -> None:
    tensors = on_cuda(1000)
    selector = UniSparse.paper(block_size=128, top_p=1.0)
    output = attention(*tensors, is_causal=True, enable_gqa=True, selector=selector)
    exact = attend(*tensors, offset=0)
    dense = F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    assert rmse(output, exact) <= 2 * rmse(dense, exact)


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_attention_over_the_same_blocks(compiled: bool) -> None:
    torch._dynamo.reset()
    model: Any = optimize(Sdpa(), BLOCKS, min_length=0)
    run = torch.compile(model, fullgraph=True) if compiled else model
    # 18 x 18 blocks of 4 heads: lists whose stride Inductor pads.
    tensors = [t.requires_grad_() for t in on_cuda(2200)]
    weights = torch.randn(2, 4, 2200, 64, device="cuda")

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        output = attend(*tensors, selector=BLOCKS, offset=0, dtype=dtype)
        return torch.autograd.grad((output * weights).sum(), tensors)

    found = torch.autograd.grad((run(*tensors) * weights).sum(), tensors)
    for gradient, exact, plain in zip(
        found, gradients(torch.float64), gradients(BF16), strict=True
    ):
        # The definition's own gradients are rounded to bfloat16 as well.
        assert rmse(gradient, exact) <= max(2 * rmse(plain, exact), 2.0**-7)


def test_training_with_blocks_that_the_backward_cannot_tile_is_dense() -> None:
    selector = UniSparse.paper(block_size=64, top_p=0.6)
    query, key, value = (t.requires_grad_() for t in on_cuda(700))
    tensors = query, key, value
    model = optimize(Sdpa(), selector, min_length=0)
    with record_attention(model) as calls:
        output = model(*tensors)
    assert [call.reason for call in calls] == [DenseReason.BACKWARD_BLOCK]
    with torch.no_grad():
        assert rmse(output.detach(), attend(*tensors, offset=0)) < 2.0**-7
    with pytest.raises(NotImplementedError, match="multiple of 128"):
        attention(*tensors, is_causal=True, enable_gqa=True, selector=selector)


def test_short_prompts_stay_dense_by_default() -> None:
    model, tensors = optimize(Sdpa()), on_cuda(1024, batch=1)
    assert [call.reason for call in explain(model, *tensors).calls] == [DenseReason.SLOWER]
    assert model(*tensors).equal(Sdpa()(*tensors))


@pytest.mark.parametrize("dtype", [torch.float64, FP32])
def test_what_the_kernel_does_not_take_is_named(dtype: torch.dtype) -> None:
    tensors = on_cuda(300, dtype=dtype, head_dim=64 if dtype is torch.float64 else 8)
    model = optimize(Sdpa(), BLOCKS, min_length=0)
    assert [call.reason for call in explain(model, *tensors).calls] == [DenseReason.KERNEL]
    with pytest.raises(NotImplementedError, match="head_dim >= 16"):
        attention(*tensors, is_causal=True, enable_gqa=True, selector=BLOCKS)


@pytest.mark.parametrize("compiled", [False, True])
def test_long_prompts_allocate_no_token_mask(compiled: bool) -> None:
    torch._dynamo.reset()
    # Composite tokens of 16: their scores take 64 MiB a tensor.
    selector = UniSparse.paper(block_size=128, c_q=16, c_k=16, top_p=0.6)
    model: Any = optimize(Sdpa(), selector, min_length=0)
    run = torch.compile(model, fullgraph=True) if compiled else model
    tensors = on_cuda(LONG, batch=1)
    with torch.no_grad():
        run(*tensors)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*tensors)
        torch.cuda.synchronize()
    # One byte a pair of one head; a token mask would take four of these.
    assert torch.cuda.max_memory_allocated() - before < LONG * LONG


@pytest.mark.parametrize("masked", [False, True])
def test_selection_never_waits_for_the_device(masked: bool) -> None:
    query, key, _ = on_cuda(1000)
    geometry = BlockGeometry(
        q_len=1000, kv_len=1000, block_size=128, causal_offset=None if masked else 0
    )
    mask = torch.ones(1000, 1000, dtype=torch.bool, device="cuda").tril() if masked else None
    options: dict[str, Any] = {"geometry": geometry, "scale": 0.125, "attn_mask": mask}
    BLOCKS.compute_selection(query, key, **options)
    with never_waiting():
        selection = BLOCKS.compute_selection(query, key, **options)
        selection.block_lists()
    assert 0 < selection.density() <= 1
