"""Which kernel attends: FlashAttention-4 where it can, by name or not at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from tests.api.models import SELECTOR, create, embeddings, qkv
from unisparse_flex import attention, optimize
from unisparse_flex.passes.calls.config import SparseConfig
from unisparse_flex.passes.calls.sdpa import SdpaCall
from unisparse_flex.passes.decision import flex_support as flex_backend
from unisparse_flex.passes.decision.flex_support import flash_obstacle

from .lifting import Graph, Mask, Masked, assert_lifts


def on_cuda(
    heads: int = 4, length: Any = 32768, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """What the decision reads of a tensor, as if it were on a GPU."""
    return SimpleNamespace(
        device=torch.device("cuda", 0),
        dtype=dtype,
        shape=(1, heads, length, head_dim),
        requires_grad=False,
    )


def call(value_dim: int = 128, **changes: Any) -> SdpaCall:
    tensor = on_cuda(**changes)
    return SdpaCall(
        query=tensor,
        key=tensor,
        value=on_cuda(**{**changes, "head_dim": value_dim}),
        is_causal=True,
    )


def masked(**mask: Any) -> SdpaCall:
    return SdpaCall(query=on_cuda(), key=on_cuda(), value=on_cuda(), **mask)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(flex_backend, "is_flash_installed", lambda: True)


def test_auto_takes_flash_where_it_can_run(hopper: None) -> None:
    assert flex_backend.flex_backend(call(), 128, "auto") == "FLASH"
    assert flex_backend.flex_backend(call(), 128, "flash") == "FLASH"
    assert flex_backend.flex_backend(call(), 128, "triton") == "TRITON"
    for head_dim in (32, 64, 96):
        assert flash_obstacle(call(head_dim=head_dim, value_dim=head_dim, length=777), 128) is None
    # What a selector prepared is of its kernels, not of the formula.
    for mask in (
        "(kv <= q) & (q < kv + 300)",
        "(kv <= q) & (t0[b, kv])",
        "(kv <= q + 5) & (t0[b, q + 5] == t0[b, kv]) & (t1[b] <= kv)",
    ):
        assert flash_obstacle(masked(mask=mask, mask_tensors=[0, 0]), 128) is None


OBSTACLES = [
    (call(dtype=torch.float32), 128, "float16 and bfloat16, got torch.float32"),
    (call(), 64, "block_size 128, got 64"),
    (call(head_dim=256, value_dim=256), 128, "got 256 and 256"),
    (call(head_dim=72, value_dim=72), 128, "got 72 and 72"),
    (call(value_dim=64), 128, "got 128 and 64"),
    (masked(attn_mask=0), 128, "may free before"),
    (masked(mask="(kv <= q) | (kv < t0[b, 0])", mask_tensors=[0]), 128, "got a number"),
    (masked(mask="(kv <= q) & (t0[])", mask_tensors=[0]), 128, "got a number"),
    (masked(mask="(kv <= q) & (q // 64 == kv // 64)"), 128, "without chunks"),
]


@pytest.mark.parametrize(("made", "block_size", "reason"), OBSTACLES)
def test_what_flash_cannot_run_is_left_to_triton_and_named(
    made: SdpaCall, block_size: int, reason: str, hopper: None
) -> None:
    obstacle = flash_obstacle(made, block_size)
    assert obstacle is not None
    assert reason in obstacle
    assert flex_backend.flex_backend(made, block_size, "auto") == "TRITON"
    with pytest.raises(NotImplementedError, match="backend='flash' cannot run this call"):
        flex_backend.flex_backend(made, block_size, "flash")


def test_an_offset_that_lengths_make_is_left_to_triton(hopper: None) -> None:
    env = ShapeEnv()
    lengths = [
        env.create_symintnode(
            env.create_symbol(
                size, ConstantSource(f"length{size}"), dynamic_dim=DimDynamic.DYNAMIC
            ),
            hint=size,
        )
        for size in (1024, 4096)
    ]
    query, key = (on_cuda(length=length) for length in lengths)
    upper = SdpaCall(query=query, key=key, value=key, is_causal=True)
    assert flash_obstacle(upper, 128) is None
    lower = SdpaCall(query=query, key=key, value=key, causal_lower_right=True)
    assert "causal offset" in (flash_obstacle(lower, 128) or "")
    whole = SdpaCall(query=key, key=key, value=key, causal_lower_right=True)
    assert flash_obstacle(whole, 128) is None


def test_flash_needs_its_package_and_its_architectures(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for major in (8, 10):
        found = (major, 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, f=found: f)
        assert f"capability 9, got {major}.0" in str(flash_obstacle(call(), 128))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(flex_backend, "is_flash_installed", lambda: False)
    assert "pip install" in str(flash_obstacle(call(), 128))


def padded(query: Tensor, key: Tensor, ids: Tensor) -> Tensor:
    row, column = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    return ((column <= row) & (ids > 0)[:, None, :])[:, None]


def documents(query: Tensor, key: Tensor, ids: Tensor) -> Tensor:
    return padded(query, key, ids) & (ids[:, :, None] == ids[:, None, :])[:, None]


def images(query: Tensor, key: Tensor, ids: Tensor) -> Tensor:
    same = (ids[:, :, None] == ids[:, None, :]) & (ids[:, None, :] % 3 == 1)
    return padded(query, key, ids) | same[:, None]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mask", [padded, documents, images])
def test_a_compiled_batch_of_one_is_read_as_flash_can(mask: Mask, batch: int, hopper: None) -> None:
    query, key, _ = (tensor[:1].expand(batch, -1, -1, -1).contiguous() for tensor in qkv(50))
    ids = torch.arange(50).expand(batch, -1) // 7
    graph = Graph(Masked(mask), dynamic=False)
    graph.run(query, key, ids)
    lifted = assert_lifts(graph, graph.calls[0])
    made = masked(mask=lifted.text, mask_tensors=list(lifted.tensors))
    obstacle = flash_obstacle(made, 128)
    # A dimension of one that is not the batch is left: nothing but a number can stand there.
    left = batch > 1 and mask is images
    assert obstacle is None if not left else "got a number" in (obstacle or "")


def test_flash_needs_inference(hopper: None) -> None:
    made = call()
    made.query.requires_grad = True
    assert "backward" in str(flash_obstacle(made, 128))
    with torch.no_grad():
        assert flash_obstacle(made, 128) is None


@pytest.mark.parametrize("backend", ["flash", "triton"])
def test_a_backend_by_name_runs_or_raises_on_the_cpu(backend: Any) -> None:
    query, key, value = qkv(300)
    message = f"backend='{backend}' cannot run this call: it needs a CUDA device, got cpu; use"
    with pytest.raises(NotImplementedError, match=message):
        attention(query, key, value, is_causal=True, enable_gqa=True, backend=backend)
    model = optimize(create(), SELECTOR, min_length=0, backend=backend)
    with pytest.raises(NotImplementedError, match=message):
        model(embeddings(300))
    model.compile()
    with torch.no_grad(), pytest.raises(Exception, match=message):
        model(embeddings(300))


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'fa3'"):
        optimize(create(), SELECTOR, backend="fa3")


def test_settings_carry_the_backend() -> None:
    config = SparseConfig(selector=SELECTOR, backend="triton")
    assert SparseConfig.decode(config.encode()) == config
