"""Masks that are proved from a graph, masks that are not, and what each becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.api.models import FINE, qkv
from unisparse_flex import optimize
from unisparse_flex.passes import SparseConfig, rewrite_sdpa
from unisparse_flex.passes.attend import lowered_sdpa, prepared_mask
from unisparse_flex.passes.calls.nodes import recorded
from unisparse_flex.passes.masks import ProvedMask, Unproved
from unisparse_flex.passes.masks.prove import lift_mask
from unisparse_flex.passes.rewrite.graph import PreparedMasks

from .graphs import build_graph, count_markers
from .lifting import Graph, Masked, assert_lifts, lift, mask_of

arange = torch.arange
LENGTH = 50


def ones(query: Tensor, key: Tensor) -> Tensor:
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)


def rows(query: Tensor) -> Tensor:
    return arange(query.shape[2])[:, None]


def columns(key: Tensor) -> Tensor:
    return arange(key.shape[2])


def causal(query: Tensor, key: Tensor) -> Tensor:
    return columns(key) <= rows(query)


def pairs() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool)


def causal_bias() -> Tensor:
    return torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)[None, None]


def _changed(query: Tensor, key: Tensor, ids: Tensor) -> Tensor:
    mask = causal(query, key).expand(2, 1, -1, -1).clone()
    mask &= (ids > 0)[:, None, None]
    mask.logical_or_(columns(key) < 0)
    return mask


def vmapped(mask: Callable[..., Tensor], *sizes: int) -> Tensor:
    for dims in [
        (None,) * 3 + (0,),
        (None, None, 0, None),
        (None, 0, None, None),
        (0,) + (None,) * 3,
    ]:
        mask = torch.vmap(mask, in_dims=dims, out_dims=0)
    return mask(*(arange(size) for size in sizes))


def vmapped_documents(query: Tensor, key: Tensor, ids: Tensor) -> Tensor:
    def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv <= q) & (ids[b, q] == ids[b, kv])

    return vmapped(mask, query.shape[0], 1, query.shape[2], key.shape[2])


PROVED: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "tril of ones": ("causal", lambda q, k, i: ones(q, k).tril()),
    "tril with a diagonal": ("causal", lambda q, k, i: ones(q, k).tril(diagonal=3)),
    "tril above": ("causal", lambda q, k, i: torch.tril(ones(q, k), -2)),
    "not triu": ("causal", lambda q, k, i: ~ones(q, k).triu(1)),
    "broadcast": ("causal", lambda q, k, i: causal(q, k)[None, None]),
    "transposed": ("causal", lambda q, k, i: rows(q) >= columns(k)[:, None].T),
    "transposed back": ("causal", lambda q, k, i: (columns(k)[:, None] <= columns(k)).T.mT.T),
    "less than plus one": ("causal", lambda q, k, i: columns(k) < rows(q) + 1),
    "view": ("causal", lambda q, k, i: columns(k).view(1, -1) <= columns(k).reshape(-1, 1)),
    "repeat": ("causal", lambda q, k, i: causal(q, k).repeat(2, 1, 1, 1)),
    "where": ("causal", lambda q, k, i: torch.where(causal(q, k), 0.0, -torch.inf)),
    "masked_fill": (
        "causal",
        lambda q, k, i: torch.zeros(LENGTH, LENGTH).masked_fill(
            ~causal(q, k), torch.finfo(q.dtype).min
        ),
    ),
    "band of a causal mask": (
        "causal, sliding window 20",
        lambda q, k, i: causal(q, k) & ~causal(q, k).tril(-20),
    ),
    "full triu": (
        "causal",
        lambda q, k, i: torch.full((LENGTH, LENGTH), torch.finfo(q.dtype).min).triu(1),
    ),
    "one minus": (
        "causal",
        lambda q, k, i: (1.0 - causal(q, k).float()) * torch.finfo(q.dtype).min,
    ),
    "sum of additive": (
        "causal, sliding window 8",
        lambda q, k, i: (
            torch.where(causal(q, k), 0.0, torch.finfo(q.dtype).min)
            + torch.where(rows(q) - columns(k) < 8, 0.0, torch.finfo(q.dtype).min)
        ),
    ),
    "key padding": ("key padding", lambda q, k, i: i[:, None, None, :] > 0),
    "key padding as ints": ("key padding", lambda q, k, i: (i != 0)[:, None, None].to(torch.bool)),
    "additive key padding": (
        "key padding",
        lambda q, k, i: (1.0 - (i > 0)[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min,
    ),
    "causal and padded": (
        "causal, key padding",
        lambda q, k, i: torch.logical_and(causal(q, k), (i > 0)[:, None, None]),
    ),
    "product of truths": (
        "causal, key padding",
        lambda q, k, i: causal(q, k) * (i > 0)[:, None, None],
    ),
    "window": (
        "causal, sliding window 7",
        lambda q, k, i: causal(q, k) & (columns(k) > rows(q) - 7),
    ),
    "bidirectional window": (
        "causal, sliding window 11",
        lambda q, k, i: (rows(q) - columns(k)).abs() <= 5,
    ),
    "documents": (
        "causal, document",
        lambda q, k, i: causal(q, k) & (i[:, None, :, None] == i[:, None, None]),
    ),
    "documents by vmap": ("causal, document", vmapped_documents),
    "documents by cumsum": (
        "document",
        lambda q, k, i: i.cumsum(-1)[:, None, :, None] == i.cumsum(-1)[:, None, None, :],
    ),
    "prefix": ("prefix", lambda q, k, i: causal(q, k) | (columns(k) < i[:, :1, None, None])),
    "chunks": (
        "causal, chunks of 16",
        lambda q, k, i: causal(q, k) & (columns(k) // 16 == rows(q) // 16),
    ),
    "gathered positions": (
        "causal",
        lambda q, k, i: columns(k)[arange(LENGTH)[None, :]] <= columns(k)[arange(LENGTH)[:, None]],
    ),
    "every second key": ("other", lambda q, k, i: arange(0, 2 * LENGTH, 2) <= rows(q)),
    "from another start": ("causal", lambda q, k, i: arange(5, LENGTH + 5) <= rows(q)),
    "counted down": ("other", lambda q, k, i: arange(LENGTH, 0, -1) <= rows(q)),
    "sliced": ("causal", lambda q, k, i: ones(q, torch.cat([k, k], 2)).tril()[:, 3 : LENGTH + 3]),
    "exclusive or": ("causal", lambda q, k, i: causal(q, k) ^ (columns(k) < 0)),
    "queries padded": (
        "query padding",
        lambda q, k, i: (i > 0)[:, None, :, None].expand(-1, 1, -1, LENGTH),
    ),
    "integers that overflow": (
        "causal by position",
        lambda q, k, i: columns(k) * 2**60 <= rows(q) * 2**60,
    ),
    "wraps": (
        "window by position",
        lambda q, k, i: columns(k)[(columns(k) - 3)[:, None]] <= columns(k),
    ),
    "memory in front": (
        "prefix",
        lambda q, k, i: torch.hstack(
            [torch.ones(LENGTH, 9).bool(), torch.ones(LENGTH, LENGTH - 9).bool().tril(-9)]
        ),
    ),
    "nothing in front": (
        "causal",
        lambda q, k, i: torch.hstack(
            [torch.zeros(LENGTH, 0), torch.full((LENGTH, LENGTH), -torch.inf).triu(1)]
        ),
    ),
    "one above the other": (
        "other",
        lambda q, k, i: torch.vstack([pairs()[:9], pairs().tril()[9:30], pairs().tril(-3)[30:]]),
    ),
    "grid of positions": (
        "causal",
        lambda q, k, i: torch.ge(*torch.meshgrid(arange(LENGTH), arange(LENGTH), indexing="ij")),
    ),
    "grid of positions, xy": (
        "causal",
        lambda q, k, i: torch.le(*torch.meshgrid([arange(LENGTH), arange(LENGTH)], indexing="xy")),
    ),
    "logarithm": (
        "causal, sliding window 20",
        lambda q, k, i: torch.log(torch.triu(torch.tril(torch.ones(LENGTH, LENGTH)), -19)),
    ),
    "clamped": (
        "causal, key padding",
        lambda q, k, i: torch.clamp(
            torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)
            + (1.0 - (i > 0)[:, None, None].float()) * torch.finfo(q.dtype).min,
            min=torch.finfo(q.dtype).min,
        ),
    ),
    "filled where causal and padded": (
        "causal, key padding",
        lambda q, k, i: causal_bias().masked_fill(
            (causal_bias() == 0) & (i[:, None, None] == 0), torch.finfo(q.dtype).min
        ),
    ),
    "chunks by distance": (
        "causal, chunks of 16",
        lambda q, k, i: (((columns(k) // 16 - rows(q) // 16).abs()) == 0) & causal(q, k),
    ),
    "exclusive or of triangles": (
        "causal, sliding window 20",
        lambda q, k, i: torch.bitwise_xor(causal(q, k), torch.tril(causal(q, k), -20)),
    ),
    "made in place": ("causal", lambda q, k, i: ones(q, k).tril_()[None]),
    "filled in place": (
        "causal, key padding",
        lambda q, k, i: (
            torch.zeros(2, 1, LENGTH, LENGTH)
            .masked_fill_(causal(q, k).logical_not(), -torch.inf)
            .masked_fill_((i == 0)[:, None, None], -torch.inf)[:, :1]
        ),
    ),
    "changed in place twice": ("causal, key padding", lambda q, k, i: _changed(q, k, i)[:, :1]),
    "zeroed, and added to": (
        "causal",
        lambda q, k, i: (
            torch.empty(LENGTH, LENGTH)
            .zero_()
            .add_(causal(q, k))
            .sub_(1)
            .mul_(1e38)
            .mul_(1e38)[None]
        ),
    ),
    "rows unlike": ("other", lambda q, k, i: (rows(q) + columns(k)) <= 60),
}

UNPROVED: dict[str, tuple[Unproved, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "random": (Unproved.PAIRS, lambda q, k, i: torch.rand(LENGTH, LENGTH) < 0.5),
    "causal and random": (
        Unproved.PAIRS,
        lambda q, k, i: causal(q, k) & (torch.rand(LENGTH, LENGTH) < 0.5),
    ),
    "causal by data": (Unproved.PAIRS, lambda q, k, i: causal(q, k) | (i[0, :, None] * i[0] > 3)),
    "narrow integers": (
        Unproved.PAIRS,
        lambda q, k, i: arange(LENGTH, dtype=torch.int8) * 3 <= rows(q).to(torch.int8) * 3,
    ),
    "bits of integers": (Unproved.PAIRS, lambda q, k, i: (columns(k) & rows(q)) > 0),
    "a bias beside hiding": (
        Unproved.BIAS,
        lambda q, k, i: torch.where(causal(q, k), 0.5, -torch.inf),
    ),
    "alibi": (
        Unproved.BIAS,
        lambda q, k, i: (columns(k) - rows(q)) * torch.rand(4)[:, None, None],
    ),
    "a window for each head": (
        Unproved.HEADS,
        lambda q, k, i: rows(q) - columns(k) < arange(4)[:, None, None] * 8,
    ),
    "heads by data": (Unproved.HEADS, lambda q, k, i: torch.rand(4, 1, LENGTH) < 0.5),
}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    query, key, _ = qkv(LENGTH, batch=2)
    ids = torch.randint(0, 3, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    return query, key, ids


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", list(PROVED))
def test_a_mask_that_is_proved_is_what_the_graph_computes(name: str, dynamic: bool) -> None:
    kind, mask = PROVED[name]
    graph = Graph(Masked(mask), dynamic=dynamic)
    graph.run(*inputs())
    (call,) = graph.calls
    lifted = assert_lifts(graph, call)
    assert lifted.kind == kind


@pytest.mark.parametrize("name", list(UNPROVED))
def test_a_mask_that_is_not_proved_stays_a_tensor(name: str) -> None:
    reason, mask = UNPROVED[name]
    graph = Graph(Masked(mask))
    graph.run(*inputs())
    (call,) = graph.calls
    assert lift(call) is reason
    report = rewrite_sdpa(graph.modules[-1], SparseConfig(selector=FINE))
    assert list(report.unproved.values()) == [reason]
    assert report.masks == {}
    (marker,) = graph.calls
    assert mask_of(marker) is not None
    assert marker.kwargs["mask"] == ""
    assert f"mask kept as a tensor: {reason}" in str(report)


NEARLY = {
    "one pair more": lambda q, k: causal(q, k) | ((rows(q) == 0) & (columns(k) == 1)),
    "one pair less": lambda q, k: causal(q, k) & ~((rows(q) == 9) & (columns(k) == 9)),
    "strictly": lambda q, k: columns(k) < rows(q),
    "one more": lambda q, k: columns(k) <= rows(q) + 1,
    "by position": lambda q, k: columns(k) <= arange(0, 2 * LENGTH, 2)[:, None],
}


@pytest.mark.parametrize("name", list(NEARLY))
def test_a_mask_that_is_nearly_causal_is_not_called_causal(name: str) -> None:
    graph = Graph(Masked(lambda q, k, i: NEARLY[name](q, k)))
    graph.run(*inputs())
    (call,) = graph.calls
    assert_lifts(graph, call)
    rewrite_sdpa(graph.modules[-1], SparseConfig(selector=FINE))
    (marker,) = graph.calls
    assert marker.args[5] is False
    assert marker.kwargs["mask"]


MUTATED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "entry": lambda q, k, i: _set(causal(q, k), (0, 1)),
    "view": lambda q, k, i: _fill(causal(q, k), lambda mask: mask[None].select(1, 3)),
    "padding": lambda q, k, i: _fill(i, lambda ids: ids[:, :4])[:, None, None] > 0,
    "operator on a view": lambda q, k, i: _iand(causal(q, k), (i > 0)[0]),
    "read before": lambda q, k, i: _read_before(causal(q, k), (i > 0)[0]),
    "viewed before": lambda q, k, i: _viewed_before(ones(q, k)),
    "by what is not understood": lambda q, k, i: causal(q, k).bernoulli_(0.5)[None],
    "by what is understood, then not": lambda q, k, i: causal(q, k).tril_(3).bernoulli_(0.5)[None],
    "of integers": lambda q, k, i: _of_integers(i),
    "out": lambda q, k, i: torch.logical_not(causal(q, k), out=torch.empty(LENGTH, LENGTH).bool()),
}


def _set(mask: Tensor, at: Any) -> Tensor:
    mask[at] = True
    return mask


def _fill(tensor: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
    view(tensor).fill_(0)
    return tensor


def _iand(mask: Tensor, other: Tensor) -> Tensor:
    part = mask[..., :7]
    part &= other[..., :7]
    return mask


def _of_integers(ids: Tensor) -> Tensor:
    ids = ids.clone()
    ids &= 2
    return ids[:, None, None] > 0


def _read_before(mask: Tensor, other: Tensor) -> Tensor:
    before = mask.float()
    mask &= other
    return (before > 0) | mask


def _viewed_before(mask: Tensor) -> Tensor:
    view = mask[None]
    mask.tril_()
    return view


@pytest.mark.parametrize("name", list(MUTATED))
def test_a_mask_that_is_changed_in_place_is_not_proved(name: str) -> None:
    graph = Graph(Masked(MUTATED[name]))
    graph.run(*inputs())
    (call,) = graph.calls
    assert lift(call) in (Unproved.MUTATED, Unproved.PAIRS)


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_index_beyond_a_tensor_still_fails(dynamic: bool) -> None:
    def by_row(query: Tensor, key: Tensor, ids: Tensor) -> Tensor:
        return causal(query, key) & (ids > 0)[arange(query.shape[0])][:, None, None]

    torch._dynamo.reset()
    optimized = optimize(Masked(by_row), FINE, min_length=0)
    run = torch.compile(optimized, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    query, key, ids = inputs()
    assert run(query, key, ids).shape == query.shape
    for few in (ids[:1], torch.cat([ids, ids])[:1]):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            run(query, key, few)
    assert run(query, key, torch.cat([ids, ids])).equal(run(query, key, ids))


def test_a_mask_of_unknown_shape_is_not_proved() -> None:
    from unisparse_flex.passes.calls.sdpa import SdpaCall

    query, key, _ = inputs()
    call = SdpaCall(query=query, key=key, value=key, attn_mask=torch.ones(LENGTH, LENGTH).bool())
    graph = build_graph(call, torch.nn.functional.scaled_dot_product_attention)
    mask = next(node for node in graph.nodes if node.name == "attn_mask")
    assert lift_mask(mask, (2, 4, LENGTH, LENGTH)) is Unproved.PAIRS
    mask.meta.clear()
    assert lift_mask(mask, (2, 4, LENGTH, LENGTH)) is Unproved.UNRECORDED


@pytest.mark.parametrize("offset", [0, 7, 30, 64])
@pytest.mark.parametrize("dynamic", [False, True])
def test_causality_becomes_a_flag_only_where_it_is_aligned_with_a_corner(
    offset: int, dynamic: bool
) -> None:
    query, key, _ = qkv(66, 130)
    ids = torch.zeros(1, 130, dtype=torch.int64)
    mask = Masked(lambda q, k, i: columns(k) <= rows(q) + (k.shape[2] - q.shape[2]) - 64 + offset)
    graph = Graph(mask, dynamic=dynamic)
    graph.run(query, key, ids)
    (call,) = graph.calls
    assert_lifts(graph, call)
    report = rewrite_sdpa(graph.modules[-1], SparseConfig(selector=FINE))
    assert list(report.masks.values()) == ["causal"]
    (marker,) = graph.calls
    if offset == 64 and not dynamic:
        assert marker.args[5] is False
        assert marker.kwargs["causal_lower_right"] is True
    elif not dynamic:
        assert marker.args[5] is (offset == 0)
        assert (marker.kwargs["mask"] == "") is (offset == 0)


def test_a_mask_that_two_calls_share_is_lifted_once_and_leaves_the_graph() -> None:
    def twice(query: Tensor, key: Tensor, ids: Tensor) -> Tensor:
        mask = causal(query, key) & (ids > 0)[:, None, None]
        sdpa = torch.nn.functional.scaled_dot_product_attention
        out = sdpa(query, key, key, attn_mask=mask, enable_gqa=True)
        return sdpa(out, key, key, attn_mask=mask, enable_gqa=True)

    graph = Graph(twice)
    graph.run(*inputs())
    module = graph.modules[-1]
    report = rewrite_sdpa(module, SparseConfig(selector=FINE))
    assert list(report.masks.values()) == ["causal, key padding"] * 2
    assert "2 x mask proved: causal, key padding" in str(report)
    assert count_markers(module) == 2
    sizes = [tuple(t.shape) for n in module.graph.nodes if (t := recorded(n)) is not None]
    assert not [shape for shape in sizes if shape[-2:] == (LENGTH, LENGTH)]
    first, second = (marker.kwargs["mask_tensors"] for marker in graph.calls)
    assert first == second


def test_what_a_selector_prepares_of_a_mask_is_made_once_for_the_calls_that_share_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PreparedMasks, "DEVICE", "cpu")

    def thrice(query: Tensor, key: Tensor, ids: Tensor) -> Tensor:
        mask = causal(query, key) & (ids > 0)[:, None, None]
        sdpa = torch.nn.functional.scaled_dot_product_attention
        out = sdpa(query, key, key, attn_mask=mask, enable_gqa=True)
        out = sdpa(out, key, key, attn_mask=mask, enable_gqa=True)
        other = causal(query, key) & (ids > 1)[:, None, None]
        return sdpa(out, key, key, attn_mask=other, enable_gqa=True)

    graph = Graph(thrice)
    exact = graph.run(*inputs())
    module = graph.modules[-1]
    rewrite_sdpa(
        module, SparseConfig(selector=FINE.__class__(block_size=16, top_p=1.0)), lower=True
    )
    lowered = [node for node in module.graph.nodes if node.target is lowered_sdpa]
    first, second, third = (node.kwargs["prepared"] for node in lowered)
    assert first is second
    assert third is not first
    assert first.target is prepared_mask
    # Nothing is prepared for a selector without kernels here, and nothing changes.
    torch.testing.assert_close(graph.run(*inputs()), exact)


@pytest.mark.parametrize(
    "name", ["tril of ones", "where", "causal and padded", "documents", "window"]
)
def test_a_mask_in_an_exported_graph_is_proved(name: str) -> None:
    kind, mask = PROVED[name]
    program = torch.export.export(Masked(mask), inputs())
    before = program.module()(*inputs())
    report = rewrite_sdpa(program, SparseConfig(selector=FINE.__class__(block_size=16, top_p=1.0)))
    assert list(report.masks.values()) == [kind]
    torch.testing.assert_close(program.module()(*inputs()), before)


def test_lifted_masks_of_one_kind_have_equal_text() -> None:
    texts = set()
    for name in ("tril of ones", "not triu", "transposed", "less than plus one", "where"):
        graph = Graph(Masked(PROVED[name][1]))
        graph.run(*inputs())
        lifted = lift(graph.calls[0])
        assert isinstance(lifted, ProvedMask)
        texts.add(lifted.text)
    assert texts == {"kv <= q"}
