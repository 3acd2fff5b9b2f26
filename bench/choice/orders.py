"""Orders of keys within segments, one for every key head: by weight, by content, by both.

An order is int64 [Hkv, whole segments], positions of keys; every segment holds its own. What is
left of the keys at the end stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .parts import Call, Part

Order = Callable[[Call, int, int], Tensor]


def natural() -> Order:
    """As they are: for rows that are sorted."""

    def order(call: Call, segment: int, lag: int) -> Tensor:
        place = torch.arange(call.tokens, device=call.key.device)
        return place.expand(call.key.shape[0], -1)

    return order


def by_weight(rows: int, *, highest: bool = False) -> Order:
    """By the mass that ``rows`` of every later block give a key, heaviest first."""

    def order(call: Call, segment: int, lag: int) -> Tensor:
        weights = column_masses(call, segment, lag, rows, highest=highest)
        return _positions(weights.unflatten(1, (-1, segment)).argsort(-1, descending=True))

    return order


def heavy_first(rows: float, count: int) -> Order:
    """The ``count`` heaviest keys of a segment, then the others as they are."""

    def order(call: Call, segment: int, lag: int) -> Tensor:
        weights = column_masses(call, segment, lag, rows).unflatten(1, (-1, segment))
        ranks = weights.argsort(-1, descending=True).argsort(-1)
        place = torch.arange(segment, device=weights.device)
        return _positions(torch.where(ranks < count, ranks - segment, place).argsort(-1))

    return order


def by_content(*, means: bool = False) -> Order:
    """Balanced groups of keys that are alike to the queries, by repeated halving.

    With ``means`` to the means of blocks of queries.
    """

    def order(call: Call, segment: int, lag: int) -> Tensor:
        features = seen_by_queries(call, means=means).unflatten(1, (-1, segment))
        return _positions(halve(features, segment // call.tile.keys, call.tile.keys))

    return order


def by_use(rows: int, width: int = 32) -> Order:
    """Balanced groups of keys to which the same later rows attend."""

    def order(call: Call, segment: int, lag: int) -> Tensor:
        features = uses(call, segment, lag, rows, width).unflatten(1, (-1, segment))
        return _positions(halve(features, segment // call.tile.keys, call.tile.keys))

    return order


def heavy_then_content(rows: int, blocks: int, *, use: bool = False) -> Order:
    """The heaviest keys of a segment by weight in ``blocks``, the others by content or use."""

    def order(call: Call, segment: int, lag: int) -> Tensor:
        weights = column_masses(call, segment, lag, rows).unflatten(1, (-1, segment))
        ranked = weights.argsort(-1, descending=True)
        features = uses(call, segment, lag, rows, 32) if use else seen_by_queries(call)
        heavy, rest = ranked.split([blocks * call.tile.keys, segment - blocks * call.tile.keys], -1)
        light = _take(features.unflatten(1, (-1, segment)), rest)
        inner = halve(light, segment // call.tile.keys - blocks, call.tile.keys)
        return _positions(torch.cat([heavy, rest.gather(-1, inner)], -1))

    return order


def content_then_weight(rows: int, groups: int) -> Order:
    """Halved by content into ``groups``, each by weight."""

    def order(call: Call, segment: int, lag: int) -> Tensor:
        features = seen_by_queries(call).unflatten(1, (-1, segment))
        weights = column_masses(call, segment, lag, rows).unflatten(1, (-1, segment))
        cut = halve(features, groups, segment // groups)
        inner = weights.gather(-1, cut).unflatten(-1, (groups, -1)).argsort(-1, descending=True)
        return _positions(cut.unflatten(-1, (groups, -1)).gather(-1, inner).flatten(-2))

    return order


def column_masses(
    call: Call, segment: int, lag: int, rows: float, *, highest: bool = False
) -> Tensor:
    """What sampled rows that see a key in its sorted place give it: float32 [Hkv, segments]."""
    whole = call.tokens - call.tokens % segment
    found = torch.zeros(call.key.shape[0], whole, device=call.key.device)
    for split, shares in _later_rows(call, segment, lag, rows):
        if highest:
            seen = shares.amax((1, 2))
            found[:, :split] = torch.maximum(found[:, :split], seen)
        else:
            found[:, :split] += shares.sum((1, 2))
    return found


def uses(call: Call, segment: int, lag: int, rows: int, width: int) -> Tensor:
    """Roots of what later rows give a key, projected at random: [Hkv, S, width]."""
    draw = torch.Generator(device=call.key.device).manual_seed(0)
    found = torch.zeros(*call.key.shape[:2], width, device=call.key.device)
    for split, shares in _later_rows(call, segment, lag, rows):
        heads, group, count, keys = shares.shape
        columns = shares.sqrt().reshape(heads, group * count, keys)
        signs = torch.randn(group * count, width, device=shares.device, generator=draw)
        found[:, :split] += columns.mT @ signs
    return found


def _later_rows(call: Call, segment: int, lag: int, rows: float) -> Iterator[tuple[int, Tensor]]:
    """For every segment with sorted keys before it: their number, and shares of its rows."""
    for first in range((lag + 1) * segment, call.tokens, segment):
        last = min(first + segment, call.tokens)
        part = Part(
            query=call.query[:, :, first:last],
            key=call.key[:, :last],
            first=first,
            scale=call.scale,
            tile=call.tile,
        )
        split = first - lag * segment
        yield split, part.exact_logits(part.sampled(rows)).softmax(-1)[..., :split]


def seen_by_queries(call: Call, *, means: bool = False) -> Tensor:
    """Keys in a basis in which distance is the expected difference of logits: [Hkv, S, D]."""
    queries = call.query.float()
    if means:
        queries = queries.unflatten(2, (-1, call.tile.rows)).mean(3)
    return call.key.float() @ _root(queries.flatten(1, 2))


def sort_rows(query: Tensor, key: Tensor, size: int) -> Tensor:
    """Rows in blocks of such that are alike to the keys: int64 [Hkv, G, R].

    Args:
        query: [Hkv, G, R, D].
        key: [Hkv, E, D].
        size: Rows of a block.
    """
    centred = key.float() - key.float().mean(1, keepdim=True)
    return halve(query.float() @ _root(centred)[:, None], query.shape[2] // size, size)


def _root(tokens: Tensor) -> Tensor:
    """A matrix whose product with its transpose is about the second moment: [Hkv, D, D]."""
    moment = tokens.mT @ tokens / tokens.shape[1]
    size = moment.diagonal(dim1=-2, dim2=-1).mean(-1) * 1e-4 + 1e-12
    return torch.linalg.cholesky(
        moment + size[:, None, None] * torch.eye(tokens.shape[2]).to(moment)
    )


def halve(features: Tensor, parts: int, size: int) -> Tensor:
    """Positions in equal groups, by halving along the longest axis: int64 [..., parts * size].

    Args:
        features: [..., parts * size, F].
        parts: Groups.
        size: Of each.
    """
    if parts == 1:
        place = torch.arange(features.shape[-2], device=features.device)
        return place.expand(features.shape[:-1])
    centred = features - features.mean(-2, keepdim=True)
    spread = centred.mT @ centred
    axis = spread.sum(-1, keepdim=True) + 1e-6
    for _ in range(6):
        axis = spread @ axis
        axis = axis / axis.norm(dim=-2, keepdim=True).clamp_min(1e-20)
    ranked = (centred @ axis)[..., 0].argsort(-1)
    left = parts // 2
    halves = ranked.split([left * size, (parts - left) * size], -1)
    inner = [
        halve(_take(features, half), count, size)
        for half, count in zip(halves, (left, parts - left), strict=True)
    ]
    return torch.cat([h.gather(-1, i) for h, i in zip(halves, inner, strict=True)], -1)


def _take(features: Tensor, index: Tensor) -> Tensor:
    return features.gather(-2, index[..., None].expand(*index.shape, features.shape[-1]))


def _positions(order: Tensor) -> Tensor:
    """[Hkv, segments, segment] within segments as positions, [Hkv, S]."""
    starts = torch.arange(order.shape[1], device=order.device) * order.shape[2]
    return (order + starts[:, None]).flatten(1)
