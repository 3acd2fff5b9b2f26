"""Which keys a decoding query reads: units of a page, chosen from the summaries of its sequence.

Symbols: B requests, Hq/Hkv heads, G query heads of a key head, n pages of a request at most, P keys
of a page, U keys of a unit, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..validation import validate_fraction, validate_int
from .summaries import PageSummaries, UnitSummaries
from .tables import PageTables


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSelector:
    """Which keys are kept for a decoding query; one choice for the query heads of a key head.

    Keys are kept or left out in units, parts of a page. Units are ranked by their share of the
    attention as summaries estimate it, the mean over the query heads of a key head; where shares
    agree in 8 significant bits the earlier unit goes first. Whatever the numbers say, the first
    units and the last ones stay, and those that the end of the prompt looked at most.

    The rules may be given together: what ``top_p`` asks for is kept, but no more than ``budget``
    and ``share`` allow, the smaller of both, and no less than ``min_keys`` and the units that stay.

    Attributes:
        top_p: Least share of the estimated attention that kept units hold; 1 keeps everything.
        budget: Most keys that are kept; ``None`` for no limit.
        share: Most keys that are kept, as a share of the request's; ``None`` for no limit.
        min_keys: Fewest keys that are kept. Requests of no more keys keep everything.
        unit: Keys that are kept or left out together, a power of two; at most a page.
        sink_keys: First keys that are always kept, in whole units.
        last_keys: Last keys that are always kept, in whole units; the unit of the query's own
            token is, whatever this says.
        prompt_share: Part of the kept keys that the last rows of the prompt choose, by what they
            looked at most; 0 for none. With ``top_p`` alone, of a tenth of the prompt's.
    """

    top_p: float = 1.0
    budget: int | None = None
    share: float | None = None
    min_keys: int = 512
    unit: int = 32
    sink_keys: int = 32
    last_keys: int = 64
    prompt_share: float = 0.125

    def __post_init__(self) -> None:
        validate_fraction(self.top_p, "top_p")
        if self.budget is not None:
            validate_int(self.budget, "budget", minimum=1)
        if self.share is not None:
            validate_fraction(self.share, "share")
        validate_int(self.min_keys, "min_keys", minimum=0)
        validate_int(self.unit, "unit", minimum=16)
        if self.unit & (self.unit - 1):
            raise ValueError(f"unit must be a power of two, got {self.unit}; use 32")
        validate_int(self.sink_keys, "sink_keys", minimum=0)
        validate_int(self.last_keys, "last_keys", minimum=0)
        if self.prompt_share != 0:
            validate_fraction(self.prompt_share, "prompt_share")

    @property
    def keeps_all(self) -> bool:
        """Whether every key of every request is kept."""
        return self.top_p == 1.0 and self.budget is None and self.share is None

    @property
    def text(self) -> str:
        """What differs from the defaults: ``"DecodeSelector(top_p=0.9)"``."""
        changed = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if getattr(self, name) != getattr(DecodeSelector(), name)
        }
        return f"DecodeSelector({', '.join(f'{k}={v!r}' for k, v in changed.items())})"

    def of_unit(self, unit: int) -> DecodeSelector:
        """The same with another unit."""
        return replace(self, unit=unit)

    @property
    def rule(self) -> kernels.DecodeRule:
        """The same in units, as kernels take it."""
        sinks, last = -(-self.sink_keys // self.unit), max(1, -(-self.last_keys // self.unit))
        return kernels.DecodeRule(
            top_p=self.top_p,
            budget=-1 if self.budget is None else -(-self.budget // self.unit),
            share=1.0 if self.share is None else self.share,
            fewest=max(-(-self.min_keys // self.unit), sinks + last),
            sinks=sinks,
            last=last,
        )


def estimate_masses(
    query: Tensor, units: UnitSummaries, tables: Tensor, lengths: Tensor, *, scale: float
) -> Tensor:
    """Logarithms of the masses that units have for decoding queries, as summaries estimate them.

    The logits of the m keys of a unit are taken to be normally distributed with variance v =
    (scale * q)^2.spread^2. While v is below 2 log m the sum of their exponentials is m times
    exp(scale * q.mean + v / 2); beyond, the few largest logits are the sum, and v / 2 becomes
    sqrt(2 v log m) - log m: Derrida's random energy model, 1981.

    Args:
        query: [B, Hq, D], one row of each request.
        units: Those of the cache.
        tables: int32 [B, n], the pages of each request in order.
        lengths: int32 [B], keys of each, that of the query's own token included.
        scale: Factor on the logits.

    Returns:
        [B, Hkv, G, n * P / U] in float32 (float64 for float64 keys); -inf after a request's last
        unit, NaN where keys are not finite.
    """
    order = torch.arange(tables.shape[1], device=tables.device)
    at = tables.where(order < -(-lengths // units.page)[:, None], 0).long()
    # [B, Hkv, all units, D]
    mean, spread = (part.transpose(1, 2).flatten(2, 3) for part in units.read(at))
    rows = query.to(mean.dtype).unflatten(1, (mean.shape[1], -1)) * scale
    logits = rows @ mean.mT
    variance = rows.square() @ spread.square().mT
    first = torch.arange(mean.shape[2], device=tables.device) * units.unit
    held = (lengths[:, None] - first).clamp(0, units.unit).to(mean.dtype)[:, None, None]
    size = held.clamp_min(1).log()
    frozen = (2 * variance * size).sqrt() - size
    logits = logits + size + torch.where(variance < 2 * size, variance / 2, frozen)
    return torch.where(held > 0, logits, -torch.inf)


def keep_units(
    masses: Tensor,
    lengths: Tensor,
    selector: DecodeSelector,
    pinned: Tensor | None = None,
    *,
    few: int = 0,
) -> Tensor:
    """Which units of each request are kept.

    Args:
        masses: From `estimate_masses`, [B, Hkv, G, units].
        lengths: int32 [B].
        selector: The rule, with the unit of the masses.
        pinned: Units that stay, bool [B, Hkv, units]; ``None`` for none.
        few: Keys of a request that keeps everything.

    Returns:
        bool [B, Hkv, units].
    """
    rule = selector.rule._replace(whole=few // selector.unit)
    order = torch.arange(masses.shape[-1], device=masses.device)
    count = (-(-lengths // selector.unit))[:, None, None]
    exists = order < count
    unknown = masses.isnan().any(2)
    shares = masses.nan_to_num(-torch.inf, torch.inf, -torch.inf).softmax(-1).nan_to_num().mean(2)
    forced = (order < rule.sinks) | (order >= count - rule.last) | unknown
    forced = (forced if pinned is None else forced | pinned) & exists
    rank = torch.where(exists, _rank(shares) + 2.0 * forced, -1.0)
    ranked, by_rank = rank.sort(dim=-1, descending=True, stable=True)
    share = shares.gather(-1, by_rank)
    held = share.cumsum(-1)
    # A unit is needed where those before it hold too little.
    needed = (held - share < rule.top_p * held[..., -1:]) & (ranked >= 0)
    wanted = needed.sum(-1, keepdim=True) if rule.top_p < 1.0 else count
    limit = count if rule.budget < 0 else count.clamp(max=rule.budget)
    limit = torch.minimum(limit, (count * rule.share).ceil().to(limit.dtype))
    wanted = torch.minimum(wanted, limit).clamp(min=rule.fewest)
    wanted = torch.maximum(wanted, forced.sum(-1, keepdim=True))
    wanted = torch.where(count <= rule.read_whole, count, wanted)
    kept = torch.zeros_like(exists.expand_as(rank)).scatter(-1, by_rank, order < wanted)
    return kept & exists


def _rank(shares: Tensor) -> Tensor:
    """Shares of at least 2^-31 cut to 8 significant bits, of less 0: alike to who ranks them."""
    mantissa, exponent = torch.frexp(shares)
    cut = torch.ldexp((mantissa * 256).floor(), exponent - 8)
    return torch.where(shares < 2.0**-31, 0.0, cut)


def choose_units(
    query: Tensor,
    units: UnitSummaries,
    tables: Tensor,
    lengths: Tensor,
    out: PageTables,
    *,
    selector: DecodeSelector,
    scale: float,
    steps: tuple[int, int, int],
    packed: Tensor | None = None,
    few: int = 0,
    written: PageSummaries | None = None,
) -> None:
    """Writes the units that decoding queries read as the pages of B * Hkv sequences.

    Units of a sequence stand in order, so that its last one, which may be filled in part, is last.
    On CUDA nothing waits for the GPU, and graphs may record it.

    Args:
        query: [B, Hq, D], one row of each request.
        units: Those of the cache, up to date with the queries' own tokens, or without these and
            ``written``.
        tables: int32 [B, n], the pages of each request in order.
        lengths: int32 [B], keys of each; 0 for none.
        out: Where they are written, from the first sequence on; at least n * P / U wide. Its
            counter has two places: kept units, and those of all requests.
        selector: Which units are kept, of as many keys.
        scale: Factor on the logits.
        steps: What a page, a key head, and a unit of a page, adds to the number of a unit.
        packed: [B, Hq, D], contiguous, where the query is copied to: kernels that attend take
            key heads for sequences, and rows of them side by side. ``None`` for nowhere.
        few: Keys of a request that is read whole: to choose would take longer.
        written: The summaries that ``units`` are part of, where they are first to be brought up to
            date with each request's last key, as `PageSummaries.update` does.
    """
    unit, page, kv_heads = units.unit, units.page, units.numbers.shape[1]
    if query.device.type == "cuda":
        kernels.choose_units(
            query,
            units.numbers,
            units.scales,
            units.pinned,
            tables,
            lengths,
            out.tables,
            out.lengths,
            out.counter,
            unit=unit,
            rule=selector.rule._replace(whole=few // unit),
            scale=scale,
            steps=steps,
            packed=packed,
            written=None if written is None else (written.pages, written.means),
        )
        return
    if written is not None:
        last = (lengths - 1).clamp_min(0)
        pages = tables.gather(1, (last // page)[:, None].long())[:, 0].long()
        written.update(torch.where(lengths > 0, pages * page + last % page, -1))
    if packed is not None:
        packed.copy_(query)
    masses = estimate_masses(query, units, tables, lengths, scale=scale)
    order = torch.arange(tables.shape[1], device=tables.device)
    at = tables.where(order < -(-lengths // page)[:, None], 0).long()
    kept = keep_units(masses, lengths, selector, units.read_pinned(at), few=few)
    counts = kept.sum(-1)
    order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    heads = torch.arange(kv_heads, device=tables.device)[:, None] * steps[1]
    pages, parts = order // (page // unit), order % (page // unit)
    numbers = tables[:, None].expand(-1, kv_heads, -1).gather(-1, pages) * steps[0]
    numbers = numbers + heads + parts * steps[2]
    place = slice(0, counts.numel())
    out.tables[place, : numbers.shape[2]] = numbers.flatten(0, 1).to(torch.int32)
    missing = -lengths[:, None] % unit
    out.lengths[place] = (counts * unit - missing).clamp(min=0).flatten().to(torch.int32)
    visible = kv_heads * (-(-lengths // unit)).sum()
    out.counter.add_(torch.stack([counts.sum(), visible]).to(out.counter))
