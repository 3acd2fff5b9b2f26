"""Eager calls with mask tensors, as on a GPU that has the kernels: read once, then formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.api.models import qkv
from tests.api.reference import attend
from unisparse_flex import UniSparse, optimize
from unisparse_flex.block_masks import masks
from unisparse_flex.block_masks.kernels import operator
from unisparse_flex.passes.attend import marker, mask_contents

from .test_masked_graphs import Runs, runs  # noqa: F401

SELECTOR = UniSparse(block_size=16, c_q=4, c_k=4, sampled_queries=2, top_k=3)
LENGTH, SHORT = 70, 32


@dataclass
class Reads:
    """Masks that were read, and the formulas of calls; ``tensor`` of those without."""

    masks: int = 0
    texts: list[str] = field(default_factory=list)


@pytest.fixture
def reads(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Reads:  # noqa: F811
    """Mask tensors are read as on CUDA."""
    found, read_mask, read_call = Reads(), masks.read_mask, mask_contents.read_call

    def count(*args: Any, **kwargs: Any) -> Any:
        found.masks += 1
        return read_mask(*args, **kwargs)

    def note(*args: Any, **kwargs: Any) -> Any:
        result = read_call(*args, **kwargs)
        found.texts.append("tensor" if result is None else result[0].mask)
        return result

    monkeypatch.setattr(mask_contents, "DEVICE", "cpu")
    monkeypatch.setattr(mask_contents, "_known", type(mask_contents._known)())
    monkeypatch.setattr(mask_contents, "read_mask", count)
    monkeypatch.setattr(marker, "read_call", note)
    return found


@pytest.fixture
def compiled_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Eager calls go through a compiled kernel, as on CUDA."""
    nested = marker._compiling
    monkeypatch.setattr(marker, "_runs_compiled", lambda _: not getattr(nested, "active", False))
    marker._compiled_sdpa.cache_clear()
    torch._dynamo.reset()
    yield
    marker._compiled_sdpa.cache_clear()


class Layers(torch.nn.Module):
    """Calls that share a mask, each with a view of it."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.count = count

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> list[Tensor]:
        return [
            F.scaled_dot_product_attention(query, key, value, mask[..., : key.shape[2]])
            for _ in range(self.count)
        ]


def causal(q_len: int, kv_len: int) -> Tensor:
    return torch.arange(kv_len) <= torch.arange(q_len)[:, None] + kv_len - q_len


def padded(*paddings: int) -> Callable[[int, int], Tensor]:
    def make(q_len: int, kv_len: int) -> Tensor:
        valid = torch.arange(kv_len) >= torch.tensor(paddings)[:, None]
        return (causal(q_len, kv_len) & valid[:, None])[:, None]

    return make


def additive(make: Callable[[int, int], Tensor]) -> Callable[[int, int], Tensor]:
    def of(q_len: int, kv_len: int) -> Tensor:
        seen = make(q_len, kv_len)
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

    return of


# Masks by lengths, the formula that is found, and how often tables are made for two layers.
MASKS = {
    "ones": (padded(0, 0), "", 0),
    "padding on the left": (padded(0, 33), "(kv <= q) & (t0[b, kv])", 1),
    "padding on the left, additive": (additive(padded(0, 33)), "(kv <= q) & (t0[b, kv])", 1),
}


@pytest.mark.parametrize("kind", MASKS)
def test_layers_share_what_was_read(reads: Reads, runs: Runs, kind: str) -> None:  # noqa: F811
    make, text, tables = MASKS[kind]
    assert_attends(make(LENGTH, LENGTH))
    assert reads.masks == 1
    assert reads.texts[:2] == [text] * 2
    assert runs.tables == tables


@pytest.mark.usefixtures("compiled_calls")
def test_compiled_calls_take_what_was_made_of_the_mask(reads: Reads, runs: Runs) -> None:  # noqa: F811
    assert_attends(padded(0, 33)(LENGTH, LENGTH))
    assert (reads.masks, runs.tables, runs.selections) == (1, 1, 2)


def assert_attends(mask: Tensor) -> None:
    """Asserts that layers attend to what plain PyTorch selects under the mask as a tensor."""
    model = optimize(Layers(), SELECTOR, min_length=0)
    tensors = qkv(LENGTH, heads=(2, 2), batch=2, head_dim=16)
    found = model(*tensors, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_contents, "DEVICE", "none")
        patch.setattr(marker, "_runs_compiled", lambda _: False)
        patch.setattr(operator, "keys_obstacle", lambda _: "plain")
        expected = model(*tensors, mask)
    for output, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(output, exact, atol=1e-5, rtol=1e-5)
    assert not found[0].allclose(F.scaled_dot_product_attention(*tensors, mask), atol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_window_of_few_blocks_is_kept_whole_without_tables(
    reads: Reads,
    runs: Runs,  # noqa: F811
    compiled: bool,
    request: pytest.FixtureRequest,
) -> None:
    if compiled:
        # The flex kernel: full blocks by lists, partial ones by the formula.
        request.getfixturevalue("compiled_calls")
    tensors = qkv(LENGTH, heads=(2, 2), batch=2, head_dim=16)
    mask = causal(LENGTH, LENGTH) & ~causal(LENGTH, LENGTH).tril(-40)
    output = optimize(Layers(), SELECTOR, min_length=0)(*tensors, mask)[0]
    torch.testing.assert_close(output, F.scaled_dot_product_attention(*tensors, mask))
    assert (reads.texts[0], runs.tables) == ("(kv <= q) & (q < kv + 40)", 0)


def test_a_mask_that_changes_is_read_again(reads: Reads) -> None:
    everything = UniSparse.paper(block_size=16, top_p=1.0)
    model = optimize(Layers(1), everything, min_length=0)
    tensors = qkv(SHORT, heads=(2, 2), batch=2, head_dim=16)
    mask = padded(0, 13)(SHORT, SHORT)
    for change in range(3):
        if change == 1:
            # In place.
            mask[1, :, :, 13:20] = False
        elif change == 2:
            # Another tensor, perhaps where the last one lay.
            del mask
            mask = padded(5, 9)(SHORT, SHORT)
        exact = attend(*tensors, attn_mask=mask)
        for output in model(*tensors, mask):
            torch.testing.assert_close(output, exact.float(), atol=1e-5, rtol=1e-5)
        assert reads.masks == change + 1


def test_a_mask_of_inference_mode_is_read_at_every_call(reads: Reads) -> None:
    model = optimize(Layers(), UniSparse.paper(block_size=16, top_p=1.0), min_length=0)
    with torch.inference_mode():
        tensors = qkv(SHORT, heads=(2, 2), batch=2, head_dim=16)
        mask = padded(0, 13)(SHORT, SHORT)
        model(*tensors, mask)
    assert reads.masks == 2


@pytest.mark.usefixtures("compiled_calls")
def test_chunks_of_a_prompt_do_not_compile_each_anew(reads: Reads) -> None:
    compilations = torch._dynamo.utils.counters["stats"]
    compilations.clear()
    model = optimize(Layers(1), UniSparse.paper(block_size=16, top_p=1.0), min_length=0)
    for start in (16, 24, 32):
        query, key, value = qkv(16, start + 16, heads=(2, 2), batch=2, head_dim=16)
        # In a static cache, where keys after the chunk exist.
        size = 60 - start - 16
        key, value = (F.pad(tensor, (0, 0, 0, size)) for tensor in (key, value))
        mask = F.pad(padded(0, 7)(16, start + 16), (0, size))
        exact = attend(query, key, value, attn_mask=mask)
        for output in model(query, key, value, mask):
            torch.testing.assert_close(output, exact.float(), atol=1e-5, rtol=1e-5)
    assert [text for text in reads.texts if "n1" in text] == ["(kv <= q + n1) & (t0[b, kv])"] * 3
    # The first chunk, and all others.
    assert compilations["unique_graphs"] <= 2


def left_alone() -> dict[str, tuple[Tensor, dict[str, Any]]]:
    mask = padded(0, 33)(LENGTH, LENGTH)
    return {
        "a bias": (torch.randn(LENGTH, LENGTH), {}),
        "pieces": (torch.rand(2, 1, LENGTH, LENGTH) < 0.5, {}),
        "a gradient": (additive(padded(0, 33))(LENGTH, LENGTH).requires_grad_(), {}),
        "too short": (mask, {"min_length": 1000}),
        "dense is faster": (mask, {"min_length": None}),
    }


@pytest.mark.parametrize("kind", left_alone())
def test_other_calls_keep_their_tensor(reads: Reads, kind: str) -> None:
    mask, settings = left_alone()[kind]
    model = optimize(Layers(), SELECTOR, **{"min_length": 0, **settings})
    tensors = qkv(LENGTH, heads=(2, 2), batch=2, head_dim=16)
    exact = optimize(Layers(), SELECTOR, **{"min_length": 0, **settings})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_contents, "DEVICE", "none")
        expected = exact(*tensors, mask)
    found = model(*tensors, mask)
    assert set(reads.texts) == {"tensor"}
    assert found[0].equal(expected[0])
    # Nothing is read of a call that is dense whatever its mask says.
    assert bool(reads.masks) == (kind in ("a bias", "pieces"))


def test_a_call_that_decides_when_it_runs_reads_its_mask(reads: Reads, runs: Runs) -> None:  # noqa: F811
    class Shared(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> list[Tensor]:
            return [F.scaled_dot_product_attention(query, key, value, mask) for _ in range(2)]

    torch._dynamo.reset()
    model = optimize(Shared(), SELECTOR, min_length=0)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in (LENGTH, LENGTH + 10):
        tensors = qkv(length, heads=(2, 2), batch=2, head_dim=16)
        mask = padded(0, 33)(length, length)
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 2, min=32, max=512)
        for dimension in (2, 3):
            torch._dynamo.mark_dynamic(mask, dimension, min=32, max=512)
        reads.masks, reads.texts = 0, []
        with torch.no_grad():
            found = run(*tensors, mask)
        assert reads.masks == 1
        assert set(reads.texts) == {"(kv <= q) & (t0[b, kv])"}
        for output, expected in zip(found, model(*tensors, mask), strict=True):
            torch.testing.assert_close(output, expected)
