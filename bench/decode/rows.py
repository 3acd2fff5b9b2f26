"""`Rows`: decoding queries and the pages of the keys that each of them sees.

A page is what is kept or left out as a whole: the library's unit.

Every row has an unfinished page of its own, so the rows of one sequence see what they would see
decoded one after the other.

Symbols: B rows, Hq/Hkv heads, G query heads of a key head, S keys, N pages, n pages of a row at
most, P keys of a page, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """Decoding queries with their keys.

    Attributes:
        query: [B, Hq, D].
        pages: Keys [N, Hkv, P, D].
        held: int64 [N], keys in each page; what lies after them says nothing.
        tables: int32 [B, n], the pages of each row in order.
        lengths: int32 [B], keys that each row sees.
        logits: float32 [B, Hkv, G, n * P]; -inf for keys that a row does not see.
        value: [Hkv, n * P, D] where rows share it, else [B, Hkv, n * P, D].
        scale: Factor on the logits.
    """

    query: Tensor
    pages: Tensor
    held: Tensor
    tables: Tensor
    lengths: Tensor
    logits: Tensor
    value: Tensor
    scale: float

    @classmethod
    def of_sequence(
        cls, query: Tensor, key: Tensor, value: Tensor, *, page: int, scale: float
    ) -> Rows:
        """The last rows of one sequence, each with the keys up to its own.

        Args:
            query: [1, Hq, B, D].
            key: [1, Hkv, S, D].
            value: [1, Hkv, S, D].
            page: P.
            scale: Factor on the logits.
        """
        count, length, device = query.shape[2], key.shape[2], query.device
        width = -(-length // page)
        padded = F.pad(key[0], (0, 0, 0, width * page - length))
        position = torch.arange(length - count, length, device=device)
        own = position // page
        finished = padded.unflatten(1, (width, page)).transpose(0, 1)
        pages = torch.cat([finished, finished[own]])
        full = torch.full((width,), page, device=device)
        order = torch.arange(width, device=device)
        private = (width + torch.arange(count, device=device))[:, None]
        tables = torch.where(order == own[:, None], private, order)
        rows = query[0].transpose(0, 1)
        return cls(
            query=rows,
            pages=pages,
            held=torch.cat([full, position % page + 1]),
            tables=tables.to(torch.int32),
            lengths=(position + 1).to(torch.int32),
            logits=_logits("bhgd,hsd->bhgs", rows, padded, position, scale),
            value=F.pad(value[0], (0, 0, 0, width * page - length)),
            scale=scale,
        )

    @classmethod
    def of_batch(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        *,
        page: int,
        scale: float,
    ) -> Rows:
        """One row of each of several sequences, all of which end at the last key.

        Args:
            query: [B, Hq, 1, D].
            key: [B, Hkv, S, D], padded on the left.
            value: [B, Hkv, S, D].
            starts: int64 [B], the first key of each sequence.
            page: P.
            scale: Factor on the logits.
        """
        count, heads, length, _ = key.shape
        width = -(-length // page)
        order = torch.arange(width * page, device=key.device)
        at = (starts[:, None] + order).clamp(max=length - 1)
        key, value = (
            part.gather(2, at[:, None, :, None].expand(-1, heads, -1, part.shape[3]))
            for part in (key, value)
        )
        lengths = length - starts
        rows = query[:, :, 0]
        first = torch.arange(width, device=key.device) * page
        return cls(
            query=rows,
            pages=key.unflatten(2, (width, page)).transpose(1, 2).flatten(0, 1),
            held=(lengths[:, None] - first).clamp(0, page).flatten(),
            tables=torch.arange(count * width, dtype=torch.int32, device=key.device).view(
                count, width
            ),
            lengths=lengths.to(torch.int32),
            logits=_logits("bhgd,bhsd->bhgs", rows, key, lengths - 1, scale),
            value=value,
            scale=scale,
        )

    @property
    def page(self) -> int:
        """P."""
        return self.pages.shape[2]

    @property
    def grouped_query(self) -> Tensor:
        """The queries in float32, multiplied by the scale: [B, Hkv, G, D]."""
        return self.query.float().unflatten(1, (self.pages.shape[1], -1)) * self.scale

    def masses(self) -> Tensor:
        """Logarithms of the true masses of pages, [B, Hkv, G, n]."""
        return self.logits.unflatten(-1, (-1, self.page)).logsumexp(-1)

    def attend(self, kept: Tensor) -> Tensor:
        """Attention over the kept pages, bool [B, Hkv, n]: [B, Hq, D] in float32."""
        weights = self._keep_keys(kept).softmax(-1)
        form = "bhgs,hsd->bhgd" if self.value.dim() == 3 else "bhgs,bhsd->bhgd"
        return torch.einsum(form, weights, self.value.float()).flatten(1, 2)

    def recall(self, kept: Tensor) -> Tensor:
        """The share of the attention that kept pages hold: the mean over rows and heads."""
        return (self._keep_keys(kept).logsumexp(-1) - self.logits.logsumexp(-1)).exp().mean()

    def share(self, kept: Tensor) -> Tensor:
        """The share of the keys that lie in kept pages, the mean over rows and key heads."""
        keys = self._keep_keys(kept)[:, :, 0].isfinite().sum(-1)
        return (keys / self.lengths[:, None]).mean()

    def _keep_keys(self, kept: Tensor) -> Tensor:
        keys = kept.repeat_interleave(self.page, -1)
        return self.logits.masked_fill(~keys[:, :, None], -torch.inf)


def _logits(form: str, rows: Tensor, key: Tensor, last: Tensor, scale: float) -> Tensor:
    """Logits of rows [B, Hq, D], -inf after the ``last`` key, int64 [B], of each."""
    heads, width = key.shape[-3], key.shape[-2]
    query = rows.float().unflatten(1, (heads, -1)) * scale
    logits = torch.einsum(form, query, key.float())
    hidden = torch.arange(width, device=key.device) > last[:, None]
    return logits.masked_fill(hidden[:, None, None], -torch.inf)
