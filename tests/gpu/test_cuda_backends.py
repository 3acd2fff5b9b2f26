"""On CUDA: FlashAttention-4 beside FlexAttention's own kernel, and the modes of torch.compile."""

from __future__ import annotations

import pytest
import torch

from tests.api.reference import rmse
from tests.gpu.test_cuda import BF16, BLOCKS, Sdpa, assert_attends, on_cuda
from unisparse_flex import attention, optimize
from unisparse_flex.passes.flex_backend import is_flash_installed

pytestmark = [
    pytest.mark.gpu,
    # Inductor's advice on every card of this kind.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings(r"ignore:\s*Online softmax"),
    # What torch and FlashAttention-4 say of themselves.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:.* is deprecated, use:DeprecationWarning"),
]

needs_flash = pytest.mark.skipif(
    not is_flash_installed(), reason="FlashAttention-4 is not installed"
)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_of_compile_are_right_for_every_new_selection(mode: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(
        optimize(Sdpa(), BLOCKS, min_length=0), mode=mode, fullgraph=True, dynamic=False
    )
    with torch.no_grad():
        for seed in range(4):
            torch.manual_seed(seed)
            tensors = tuple(tensor + 0.1 * torch.randn_like(tensor) for tensor in on_cuda(1000))
            torch.compiler.cudagraph_mark_step_begin()
            assert_attends(run(*tensors).clone(), tensors, BLOCKS, offset=0)


@needs_flash
@pytest.mark.parametrize(("q_len", "kv_len"), [(20480, 20480), (20480, 20600), (20500, 20500)])
def test_flash_attends_to_the_same_blocks(q_len: int, kv_len: int) -> None:
    torch._dynamo.reset()
    tensors = on_cuda(q_len, kv_len, dtype=BF16, head_dim=128, batch=1)
    is_causal = q_len == kv_len

    def compiled(backend: str) -> torch.Tensor:
        def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return attention(
                query,
                key,
                value,
                is_causal=is_causal,
                enable_gqa=True,
                selector=BLOCKS,
                backend=backend,
            )

        with torch.no_grad():
            return torch.compile(run, fullgraph=True, dynamic=False)(*tensors)

    assert rmse(compiled("flash"), compiled("triton").double()) < 2.0**-8


def test_flash_by_name_says_why_it_cannot() -> None:
    query, key, value = on_cuda(256, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="backend='flash' cannot run this call"):
        attention(query, key, value, is_causal=True, enable_gqa=True, backend="flash")
