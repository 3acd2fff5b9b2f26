"""On CUDA: FlashAttention-4 beside FlexAttention's own kernel, and the modes of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.api.reference import rmse
from tests.gpu.test_cuda import BF16, BLOCKS, Sdpa, assert_attends, on_cuda
from tests.gpu.test_cuda_masks import causal
from unisparse_flex import attention, optimize
from unisparse_flex.passes.decision import flex_support as flex_backend
from unisparse_flex.passes.decision.flex_support import is_flash_installed

pytestmark = pytest.mark.gpu

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


@pytest.fixture
def obstacles(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What `flash_obstacle` says, call by call."""
    found: list[str | None] = []
    ask = flex_backend.flash_obstacle

    def spy(*call: Any) -> str | None:
        found.append(ask(*call))
        return found[-1]

    monkeypatch.setattr(flex_backend, "flash_obstacle", spy)
    return found


@needs_flash
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("q_len", "kv_len", "head_dim"),
    [
        (20480, 20480, 128),
        (8192, 8192, 64),
        (1024, 1024, 96),
        (1000, 1000, 112),
        (777, 777, 80),
        (500, 500, 48),
        (300, 1000, 128),
        (1000, 8200, 64),
        (129, 20600, 32),
    ],
)
def test_flash_attends_to_the_same_blocks(
    q_len: int, kv_len: int, head_dim: int, dynamic: bool
) -> None:
    torch._dynamo.reset()

    def compiled(backend: str) -> Any:
        def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return attention(
                query,
                key,
                value,
                is_causal=q_len == kv_len,
                enable_gqa=True,
                selector=BLOCKS,
                backend=backend,
            )

        return torch.compile(run, fullgraph=True, dynamic=dynamic)

    flash, triton = compiled("flash"), compiled("triton")
    for longer in (0, 128, 57) if dynamic else (0,):
        lengths = (q_len + longer, kv_len + longer)
        tensors = on_cuda(*lengths, dtype=BF16, head_dim=head_dim, batch=1)
        with torch.no_grad():
            assert rmse(flash(*tensors), triton(*tensors).double()) < 2.0**-8


@needs_flash
def test_an_optimized_model_takes_flash_at_every_length(obstacles: list[str | None]) -> None:
    torch._dynamo.reset()
    run = torch.compile(optimize(Sdpa(), BLOCKS, min_length=0), fullgraph=True)
    with torch.no_grad():
        for length in (1000, 1500, 2048):
            tensors = on_cuda(length, dtype=BF16)
            assert_attends(run(*tensors), tensors, BLOCKS, offset=0)
    assert set(obstacles) == {None}


@needs_flash
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("width", [300, 4000])
def test_flash_attends_within_a_window(width: int, compiled: bool) -> None:
    torch._dynamo.reset()

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, backend: str) -> Any:
        position = torch.arange(query.shape[2], device=query.device)
        mask = (position <= position[:, None]) & (position > position[:, None] - width)
        options: dict[str, Any] = {"selector": BLOCKS, "backend": backend}
        return attention(query, key, value, mask, enable_gqa=True, **options)

    run_it = torch.compile(run, fullgraph=True, dynamic=False) if compiled else run
    tensors = on_cuda(5000, dtype=BF16, head_dim=128, batch=1)
    with torch.no_grad():
        flash = run_it(*tensors, "flash")
        assert rmse(flash, run_it(*tensors, "triton").double()) < 2.0**-8


def with_documents(ids: Tensor) -> Tensor:
    return (causal(ids) & (ids[:, :, None] == ids[:, None, :]))[:, None]


def padded(ids: Tensor) -> Tensor:
    return (causal(ids) & (ids > 0)[:, None, :])[:, None]


def padded_documents(ids: Tensor) -> Tensor:
    return padded(ids) & with_documents(ids)


def window_and_padding(ids: Tensor) -> Tensor:
    position = torch.arange(ids.shape[-1], device=ids.device)
    return padded(ids) & (position > position[:, None] - 2500)


def with_images(ids: Tensor) -> Tensor:
    same = (ids[:, :, None] == ids[:, None, :]) & (ids[:, None, :] % 3 == 1)
    return (causal(ids) | same)[:, None]


def with_numbers(ids: Tensor) -> Tensor:
    return (causal(ids) | (ids == 3)[:, None, :])[:, None]


MASKS = [padded, with_documents, padded_documents, window_and_padding, with_images, with_numbers]


@needs_flash
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_flash_attends_under_masks_that_read_tensors(
    mask: Callable[[Tensor], Tensor], compiled: bool, batch: int, obstacles: list[str | None]
) -> None:
    torch._dynamo.reset()

    def run(query: Tensor, key: Tensor, value: Tensor, ids: Tensor, backend: str) -> Any:
        options: dict[str, Any] = {"selector": BLOCKS, "backend": backend, "enable_gqa": True}
        # What the mask reads is computed in the graph, and little later nobody else wants it.
        output = attention(query, key, value, mask(ids + 0), **options)
        return output + attention(query, key, value, mask(ids * 1), **options)

    run_it = torch.compile(run, fullgraph=True, dynamic=False) if compiled else run
    refused = None
    if compiled and batch > 1 and mask is with_images:
        # Of a dimension of one that is not the batch the graph reads entry 0.
        refused = "got a number as an index"
    elif not compiled and mask is with_numbers:
        # Rows see keys in pieces: what is read of a mask's entries are runs.
        refused = "masks that are formulas"
    for length in (3000, 4096):
        tensors = on_cuda(length, dtype=BF16, head_dim=128, batch=batch)
        ids = torch.arange(length, device="cuda") // 700
        ids = (ids - torch.arange(batch, device="cuda")[:, None]).clamp(min=0)
        with torch.no_grad():
            expected = run_it(*tensors, ids, "triton").double()
            if refused:
                with pytest.raises(Exception, match=refused):
                    run_it(*tensors, ids, "flash")
                continue
            assert rmse(run_it(*tensors, ids, "flash"), expected) < 2.0**-7
    assert refused or set(obstacles) == {None}


def test_flash_by_name_says_why_it_cannot() -> None:
    query, key, value = on_cuda(256, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="backend='flash' cannot run this call"):
        attention(query, key, value, is_causal=True, enable_gqa=True, backend="flash")
