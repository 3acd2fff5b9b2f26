"""`patch_attention` is attention in raster order over blocks that are tiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unisparse_flex import UniSparse, explain, optimize, patch_attention
from unisparse_flex.selectors import DenseSpan, PatchOrder

from .models import qkv
from .reference import rmse

FORCED: dict[str, Any] = {"sink_blocks": 0, "last_query_blocks": 0}
ALL = UniSparse(block_size=16, top_p=1.0, **FORCED)
FEW = UniSparse(block_size=16, c_q=4, c_k=4, top_k=2, **FORCED)
ORDERS = [
    PatchOrder(grid=(4, 8, 8), tile=(2, 2, 4)),
    PatchOrder(grid=(3, 5, 9), tile=(2, 2, 4), cell=(2, 2, 1)),
    PatchOrder(grid=(9, 13), tile=(4, 4), text_before=21),
    PatchOrder(grid=(3, 5, 9), tile=(1, 2, 4), text_before=5, text_after=19),
    PatchOrder(grid=(1, 1), tile=(4, 4)),
]


def tensors(order: PatchOrder, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape: dict[str, Any] = {"batch": 2, "heads": (4, 2), "dtype": torch.float64}
    return qkv(q_len=order.num_tokens, **(shape | options))


def sdpa_over_kept(
    query: Tensor, key: Tensor, value: Tensor, order: PatchOrder, selector: UniSparse
) -> tuple[Tensor, Tensor]:
    """Masked SDPA in raster order, float64, and its mask: pairs of patches of kept blocks."""
    size, places = selector.block_size, order.inverse(query.device)
    keep = selector.select(order.permute(query), order.permute(key)).keep
    blocks = -(-order.num_tokens // size)
    text = torch.arange(1, blocks + 1, device=query.device) * size > order.num_patches
    text = text & (order.num_tokens > order.num_patches)
    keep = keep | text[:, None] | text
    block = places // size
    mask = keep[:, :, block][..., block]
    query, key, value = query.double(), key.double(), value.double()
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return output, mask


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_with_every_block_kept_it_is_sdpa_in_raster_order(order: PatchOrder) -> None:
    query, key, value = tensors(order)
    for scale in (None, 0.3):
        output = patch_attention(
            query, key, value, order=order, selector=ALL, enable_gqa=True, scale=scale
        )
        expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True, scale=scale)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS[:-1], ids=str)
def test_below_that_it_is_sdpa_over_the_kept_blocks(order: PatchOrder) -> None:
    query, key, value = tensors(order)
    output = patch_attention(query, key, value, order=order, selector=FEW, enable_gqa=True)
    expected, mask = sdpa_over_kept(query, key, value, order, FEW)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    assert not mask.all()


@pytest.mark.parametrize("order", ORDERS[2:4], ids=str)
def test_text_is_dense_and_patches_are_not(order: PatchOrder) -> None:
    query, key, value = tensors(order)
    dense = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    text = torch.ones(order.num_tokens, dtype=torch.bool)
    text[order.text_before : order.text_before + order.num_patches] = False

    def errors(*, text_rows: bool = True, text_keys: bool = True) -> tuple[float, float]:
        output = patch_attention(
            query,
            key,
            value,
            order=order,
            selector=FEW,
            enable_gqa=True,
            text_rows=text_rows,
            text_keys=text_keys,
        )
        of_text, of_patches = (rmse(output[:, :, r], dense[:, :, r]) for r in (text, ~text))
        return of_text, of_patches

    rows, patches = errors()
    assert rows < 1e-12
    assert patches > 1e-2
    assert errors(text_keys=False)[0] < 1e-12
    assert errors(text_rows=False)[0] > 1e-2
    # Rows of patches miss the text without its keys.
    assert errors(text_keys=False)[1] > patches


def test_the_default_selector_keeps_no_first_or_last_block_for_all() -> None:
    order = PatchOrder(grid=(8, 16, 16), tile=(2, 8, 8))
    query, key, value = qkv(q_len=order.num_tokens, batch=1, heads=(1, 1))
    output = patch_attention(query, key, value, order=order)
    paper = UniSparse.paper(**FORCED)
    expected = patch_attention(query, key, value, order=order, selector=paper)
    assert output.equal(expected)


@pytest.mark.parametrize("backend", [pytest.param("inductor", marks=pytest.mark.slow), "eager"])
def test_compiled_it_is_what_it_is_eagerly(backend: str, fresh_dynamo: None) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, order: PatchOrder) -> Tensor:
        return patch_attention(query, key, value, order=order, selector=FEW, enable_gqa=True)

    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    # Orders that differ in every number: a number that Dynamo made symbolic would show.
    for order in (
        PatchOrder(grid=(3, 5, 9), tile=(2, 2, 4), cell=(2, 2, 1), text_before=5),
        PatchOrder(grid=(4, 6, 7), tile=(4, 2, 2), cell=(1, 2, 2), text_before=9),
        PatchOrder(grid=(5, 4, 5), tile=(2, 4, 2), cell=(2, 1, 2), text_before=11),
    ):
        query, key, value = tensors(order, dtype=torch.float32)
        with torch.no_grad():
            output = compiled(query, key, value, order)
            plain = attend(query, key, value, order)
        exact, _ = sdpa_over_kept(query, key, value, order, FEW)
        assert rmse(output, exact) <= 2 * rmse(plain, exact)


class Encoder(nn.Module):
    """Patches kept in an order through two layers of attention."""

    def __init__(self, order: PatchOrder | None) -> None:
        super().__init__()
        self.order = order
        self.project = nn.ModuleList(nn.Linear(32, 96, bias=False) for _ in range(2))
        self.position = nn.Parameter(torch.randn(ORDERS[2].num_tokens, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        if self.order is not None:
            x = self.order.permute(x)
        for project in self.project:
            query, key, value = project(x).unflatten(-1, (2, 48)).transpose(1, 2).chunk(3, -1)
            x = x + F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return x if self.order is None else self.order.restore(x)


def test_a_model_may_keep_its_tokens_in_tile_order() -> None:
    torch.manual_seed(0)
    order = ORDERS[2]
    plain, ordered = Encoder(None).double(), Encoder(order).double()
    ordered.load_state_dict(plain.state_dict())
    x = torch.randn(2, order.num_tokens, 32, dtype=torch.float64)
    torch.testing.assert_close(ordered(x), plain(x), rtol=0, atol=1e-12)
    optimize(ordered, order.keep_text(ALL), min_length=0)
    torch.testing.assert_close(ordered(x), plain(x), rtol=0, atol=1e-12)
    optimize(ordered, order.keep_text(FEW), min_length=0)
    kept = [record.density for record in explain(ordered, x).calls]
    assert len(kept) == 2
    assert all(density is not None and density < 0.9 for density in kept)


def test_nested_selectors_are_told_apart_by_their_text() -> None:
    spans = [
        DenseSpan(selector=selector, tokens=tokens, rows=rows)
        for selector, tokens, rows in itertools.product((ALL, FEW), ("0:5", "0:6"), (True, False))
    ]
    assert len({span.text for span in spans}) == len(set(spans)) == 8
    assert eval(repr(spans[0])) == spans[0]


def test_bad_calls_are_named() -> None:
    order = PatchOrder(grid=(4, 8), tile=(4, 4))
    query, key, value = qkv(q_len=32, batch=1, heads=(2, 2))
    with pytest.raises(TypeError, match=r"order must be a PatchOrder such as .*, got \(4, 8\)"):
        patch_attention(query, key, value, order=(4, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tile must have a volume that divides .* 32, got"):
        patch_attention(
            query,
            key,
            value,
            order=PatchOrder(grid=(4, 8), tile=(3, 4)),
            selector=UniSparse(block_size=32),
        )
    with pytest.raises(ValueError, match=r"query must hold order's 32 tokens, .* got 31 \(shape"):
        patch_attention(query[:, :, 1:], key, value, order=order, selector=FEW)
    with pytest.raises(ValueError, match=r"key must hold order's 32 tokens, .* got 31 \(shape"):
        patch_attention(query, key[:, :, 1:], value[:, :, 1:], order=order, selector=FEW)
    with pytest.raises(TypeError, match=r"value must be a torch.Tensor, got NoneType"):
        patch_attention(query, key, None, order=order, selector=FEW)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"selector must be a selector such as .*, got 'UniSparse'"):
        patch_attention(query, key, value, order=order, selector="UniSparse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unless enable_gqa=True, got 2 and 1"):
        patch_attention(query, key[:, :1], value[:, :1], order=order, selector=FEW)


def test_gradients_are_those_of_sdpa_in_raster_order() -> None:
    query, key, value = inputs = tensors(ORDERS[3])
    for tensor in inputs:
        tensor.requires_grad_()
    weight = torch.randn(query.shape, dtype=torch.float64)
    output = patch_attention(query, key, value, order=ORDERS[3], selector=ALL, enable_gqa=True)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    found, wanted = (torch.autograd.grad((o * weight).sum(), inputs) for o in (output, expected))
    for gradient, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-11)
