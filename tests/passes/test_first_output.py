"""On a GPU that nobody measured, attention's first output is compared with plain PyTorch's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unisparse_flex import UniSparse, attention, explain, optimize
from unisparse_flex.block_masks import kernels
from unisparse_flex.block_masks.kernels import self_check
from unisparse_flex.passes.attend import first_output, marker
from unisparse_flex.passes.attend.sparse_attention import attend_masked, select
from unisparse_flex.passes.calls import SdpaCall, SparseConfig
from unisparse_flex.passes.decision import DenseReason, attention_proof, refusals

FEW = UniSparse(block_size=32, top_k=2)
KIND = "GPU of an unknown kind"
Kernel = Callable[[SdpaCall, SparseConfig], Tensor]


def right(call: SdpaCall, config: SparseConfig) -> Tensor:
    return attend_masked(call, select(call, config))


def forgets_a_block(call: SdpaCall, config: SparseConfig) -> Tensor:
    """Attends to the diagonal alone."""
    return right(call, SparseConfig(selector=UniSparse(block_size=32, top_k=1, sink_blocks=0)))


def forgets_the_future(call: SdpaCall, config: SparseConfig) -> Tensor:
    return F.scaled_dot_product_attention(call.query, call.key, call.value)


def is_not_finite(call: SdpaCall, config: SparseConfig) -> Tensor:
    return right(call, config) * torch.nan


WRONG = [forgets_a_block, forgets_the_future, is_not_finite]


@pytest.fixture
def on_unknown_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Kernel], list[str]]:
    """Takes the CPU for a GPU that nobody measured, with a kernel; gives what it computed."""

    def use(kernel: Kernel) -> list[str]:
        ran: list[str] = []

        def run(call: SdpaCall, config: SparseConfig, prepared: object = ()) -> Tensor:
            ran.append(str(call.query.dtype))
            return kernel(call, config)

        monkeypatch.setattr(marker, "_runs_compiled", lambda call: True)
        monkeypatch.setattr(marker, "run_compiled", run)
        return ran

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_check, "gpu_kind", lambda _: KIND)
    monkeypatch.setattr(kernels, "gpu_kind", lambda _: KIND)
    monkeypatch.setattr(attention_proof, "_index", lambda device: 0)
    monkeypatch.setattr(attention_proof, "_found", {})
    for module in (first_output, refusals):
        monkeypatch.setattr(module, "needs_proof", lambda device: True)
    monkeypatch.setattr(
        refusals,
        "_refuse_kernel",
        lambda call, config: (
            DenseReason.KERNEL_FAILS
            if attention_proof.attention_failure(call.query.device, call.query.dtype)
            else None
        ),
    )
    return use


def tokens(length: int = 500, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn((1, 2, length, 16), generator=torch.Generator().manual_seed(0))
    return (3 * drawn).to(dtype)


def attend(query: Tensor) -> Tensor:
    return attention(query, query, query, is_causal=True, selector=FEW)


def test_a_right_output_stays_and_is_compared_once(
    on_unknown_gpu: Callable[[Kernel], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    find = first_output.find_difference

    def count(output: Tensor, call: SdpaCall, config: SparseConfig) -> str:
        compared.append(find(output, call, config))
        return compared[-1]

    monkeypatch.setattr(first_output, "find_difference", count)
    ran = on_unknown_gpu(right)
    query = tokens()
    expected = right(
        SdpaCall(query=query, key=query, value=query, is_causal=True), SparseConfig(selector=FEW)
    )
    for _ in range(3):
        torch.testing.assert_close(attend(query), expected)
    assert (len(ran), compared) == (3, [""])
    # Another process on the same machine.
    attention_proof._found.clear()
    attend(query)
    assert compared == [""]
    attend(tokens(dtype=torch.bfloat16))
    assert compared == ["", ""]


@pytest.mark.parametrize("kernel", WRONG)
def test_a_wrong_output_is_dense_and_so_is_what_follows(
    kernel: Kernel,
    on_unknown_gpu: Callable[[Kernel], list[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ran = on_unknown_gpu(kernel)
    model = optimize(Attends(), FEW, min_length=0)
    dense = Attends()(tokens())
    with caplog.at_level(logging.WARNING), torch.no_grad():
        torch.testing.assert_close(model(tokens()), dense)
        torch.testing.assert_close(model(tokens()), dense)
    assert len(ran) == 1
    assert caplog.text.count("sparse attention fails on this GPU, calls stay dense") == 1
    assert KIND in caplog.text
    (call,) = explain(model, tokens()).calls
    assert call.reason is DenseReason.KERNEL_FAILS
    attention_proof._found.clear()
    with pytest.raises(NotImplementedError, match="found wrong on this GPU"):
        attend(tokens())


def test_calls_on_a_gpu_whose_attention_failed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu: Any = SimpleNamespace(
        device=torch.device("cuda", 0),
        dtype=torch.bfloat16,
        shape=(1, 4, 4096, 128),
        requires_grad=False,
    )
    call = SdpaCall(query=on_gpu, key=on_gpu, value=on_gpu, is_causal=True)
    config = SparseConfig(selector=UniSparse())
    assert refusals._refuse_kernel(call, config) is None
    monkeypatch.setattr(refusals, "needs_proof", lambda device: True)
    for found, reason in ((None, None), ("", None), ("off", DenseReason.KERNEL_FAILS)):
        monkeypatch.setattr(refusals, "attention_failure", lambda *_, found=found: found)
        assert refusals._refuse_kernel(call, config) is reason


class Attends(torch.nn.Module):
    def forward(self, query: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, query, query, is_causal=True)


@pytest.mark.parametrize("length", [1, 15, 16, 33, 500, 777])
def test_every_length_has_rows_to_compare(length: int) -> None:
    query = tokens(length)
    call = SdpaCall(query=query, key=query, value=query, is_causal=True)
    config = SparseConfig(selector=FEW)
    output = right(call, config)
    assert first_output.find_difference(output, call, config) == ""
    assert "are off by" in first_output.find_difference(output + 1, call, config)
