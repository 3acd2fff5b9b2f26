"""What ranks send one another for context parallel attention; every byte is counted.

Symbols: R ranks, B batch, H key heads, N key blocks, W numbers a token.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .layout import SequenceLayout

# Renamed in torch 2.13.
_all_gather_flat: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# What each rank says of a call before anything else is exchanged.
FACTS_BYTES, TEXT_CHARACTERS = 1024, 300
REFUSAL = "refusal"


@dataclass(eq=False)
class Exchange:
    """The collectives of one group.

    Attributes:
        group: The ranks.
        received: Bytes that this rank got from others, by what they are: ``"facts"``, ``"keys"``,
            ``"values"``, ``"composites"``, ``"needs"``, ``"blocks"``.
    """

    group: dist.ProcessGroup
    received: Counter[str] = field(default_factory=Counter)

    @property
    def rank(self) -> int:
        """This rank, counted in the group."""
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """R."""
        return dist.get_world_size(self.group)

    def agree(self, facts: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
        """Tells every rank what this one is about to do, and raises where they differ.

        The message has one size whatever it says, so ranks that differ meet here and nowhere else.

        Args:
            facts: Plain values by name. Those under ``"own"`` may differ. Or, under `REFUSAL`, the
                text of an error that this rank raises next.
            device: Where the group communicates.

        Returns:
            The facts of all ranks.

        Raises:
            ValueError: Ranks differ, or another rank refuses the call; the same on every rank.
            RuntimeError: A rank is gone.
        """
        told = self.tell(facts, device)
        if REFUSAL in facts:
            return told
        for rank, said in enumerate(told):
            if REFUSAL in said:
                raise ValueError(f"rank {rank} of the context refuses the call: {said[REFUSAL]}")
        _raise_where_different(told)
        return told

    def tell(self, facts: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
        """The facts of all ranks; see `agree`."""
        text = json.dumps(facts).encode()
        if len(text) > FACTS_BYTES:
            text = json.dumps({REFUSAL: str(facts.get(REFUSAL, "facts too long"))[:400]}).encode()
        message = torch.zeros(FACTS_BYTES, dtype=torch.uint8)
        message[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        found = self._all_gather(message.to(device), "facts", "compared settings").cpu()
        return [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in found]

    def gather(
        self,
        local: Tensor,
        layout: SequenceLayout,
        dim: int,
        kind: str,
        *,
        per_block: int | None = None,
    ) -> Tensor:
        """Every rank's part of a sequence, put together.

        Args:
            local: This rank's part.
            layout: Who holds what.
            dim: Where the tokens are, or ``per_block`` items for each block.
            kind: What it is, for `received`.
            per_block: See `SequenceLayout.assemble`.
        """
        if per_block is None:
            longest = max(layout.local_length(rank) for rank in range(self.ranks))
        else:
            blocks = (sum(s.length for s in layout.blocks(rank)) for rank in range(self.ranks))
            longest = max(blocks) * per_block
        padding = [0, 0] * (local.dim() - 1 - dim) + [0, longest - local.shape[dim]]
        parts = self._all_gather(F.pad(local, padding), kind, f"gathered {kind}")
        return layout.assemble(parts.unbind(0), dim, per_block=per_block)

    def fetch_blocks(self, local: Tensor, need: Tensor, layout: SequenceLayout) -> Tensor:
        """The blocks of other ranks that this one needs, beside its own.

        Args:
            local: This rank's tokens, [B, H, S / R, W].
            need: bool [B, H, N], blocks that some local query keeps.
            layout: Who holds what.

        Returns:
            [B, H, N * block_size, W]: own and needed blocks in their places, zeros elsewhere.
        """
        size, device = layout.block_size, local.device
        batch, heads, length, width = local.shape
        held = [
            torch.cat([torch.arange(*span, device=device) for span in layout.blocks(rank)])
            for rank in range(self.ranks)
        ]
        own = held[self.rank]
        mine = F.pad(local, (0, 0, 0, len(own) * size - length))
        mine = mine.reshape(batch, heads, len(own), size * width)
        needs = self._all_gather(need.to(torch.uint8), "needs", "asked for blocks").bool()

        # Pieces for every rank, those for the first rank first; the receiver counts the same way.
        wanted = needs[..., own]
        wanted[self.rank] = False
        to, b, h, block = wanted.nonzero(as_tuple=True)
        sent = mine[b, h, block]
        coming = torch.nn.utils.rnn.pad_sequence([need[..., at].movedim(-1, 0) for at in held])
        coming[:, self.rank] = False
        source, b, h, block = coming.permute(1, 2, 3, 0).nonzero(as_tuple=True)
        place = torch.nn.utils.rnn.pad_sequence(held, batch_first=True)[source, block]
        counts = torch.stack([_count(to, self.ranks), _count(source, self.ranks)]).tolist()

        got = sent.new_empty(sum(counts[1]), size * width)
        with self._answering("exchanged blocks"):
            dist.all_to_all_single(
                got,
                sent,
                output_split_sizes=counts[1],
                input_split_sizes=counts[0],
                group=self.group,
            )
        self.received["blocks"] += got.numel() * got.element_size()
        whole = mine.new_zeros(batch, heads, need.shape[-1], size * width)
        whole[:, :, own] = mine
        whole[b, h, place] = got
        return whole.view(batch, heads, need.shape[-1] * size, width)

    def _all_gather(self, tensor: Tensor, kind: str, doing: str) -> Tensor:
        out = tensor.new_empty(self.ranks * tensor.numel())
        with self._answering(doing):
            _all_gather_flat(out, tensor.flatten(), group=self.group)
        self.received[kind] += (self.ranks - 1) * tensor.numel() * tensor.element_size()
        return out.view(self.ranks, *tensor.shape)

    @contextmanager
    def _answering(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.ranks} lost the others while it {doing}: a rank died, "
                "or did not come within the group's timeout (init_process_group(timeout=...)); its "
                f"own output says why. {error}"
            ) from error


def shorten(text: str) -> str:
    """A text that is told whole where it is short, and else by its beginning and a digest."""
    if len(text) <= TEXT_CHARACTERS:
        return text
    return f"{text[:TEXT_CHARACTERS]}... ({hashlib.sha256(text.encode()).hexdigest()[:16]})"


def _count(ranks: Tensor, count: int) -> Tensor:
    return torch.bincount(ranks, minlength=count)


def _raise_where_different(told: list[dict[str, Any]]) -> None:
    for name, value in told[0].items():
        if name == "own":
            continue
        others = [said.get(name) for said in told]
        if any(other != value for other in others):
            listed = ", ".join(f"rank {i}: {other}" for i, other in enumerate(others))
            raise ValueError(f"{name} must be the same on every rank of the context, got {listed}")
