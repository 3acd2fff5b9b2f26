"""What the cases of the benchmark share: the shape that is served, and sizes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .engines import LLAMA, TINY, Server, Shape

# Of a causal prompt's blocks, at every length.
SHARE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What the cases share.

    Attributes:
        shape: What is served.
        folder: Where its configuration lies.
        parent: The parent's name; ``None`` on the CPU.
        prompt: Tokens of the long prompt.
        chunks: Tokens of a step.
        whole: Tokens of the prompt that is computed in one step.
        small: Tokens of each of many prompts.
        many: How many these are.
        answer: Tokens of their answers.
        lengths: How many different lengths are tried.
        decoding: Requests that decode together, the tokens of their prompts, and the model's
            layers.
    """

    shape: Shape
    folder: Path
    parent: str | None
    prompt: int
    chunks: Sequence[int]
    whole: int
    small: int
    many: int
    answer: int
    lengths: int
    decoding: Sequence[tuple[int, int, int]]

    def with_layers(self, layers: int) -> Bench:
        """The same for a model of so many layers."""
        shape = replace(self.shape, layers=layers)
        folder = shape.save(self.folder / f"layers-{layers}", self.longest)
        return replace(self, shape=shape, folder=folder)

    @property
    def longest(self) -> int:
        """Most tokens of a request."""
        return max(self.prompt, *(length for _, length, _ in self.decoding)) + 256

    def server(self, chunk: int, settings: dict[str, Any] | None, **more: Any) -> Server:
        """An engine for prompts of up to `prompt`."""
        return Server(
            model=self.folder,
            chunk=chunk,
            longest=self.longest,
            settings=settings,
            parent=self.parent,
            dtype=self.shape.dtype,
            **more,
        )

    def sides(self, chunk: int, settings: dict[str, Any], **more: Any) -> dict[str, Server]:
        """The parent and the plug-in."""
        return {
            "parent": self.server(chunk, None, **more),
            "sparse": self.server(chunk, settings, **more),
        }


def sparse_settings(tokens: int, size: int = 128) -> dict[str, Any]:
    """A selector that keeps `SHARE` of the blocks of a prompt of so many tokens."""
    return {"selector": f"UniSparse(top_k={blocks_for(-(-tokens // size))})", "min_length": 0}


def blocks_for(blocks: int) -> int:
    """Blocks a row so that `SHARE` of a causal grid is kept."""
    every = blocks * (blocks + 1) / 2
    kept = [count * blocks - count * (count - 1) / 2 for count in range(1, blocks + 1)]
    return 1 + min(range(blocks), key=lambda i: abs(kept[i] / every - SHARE))


def create_bench(device: str, folder: Path, options: argparse.Namespace) -> Bench:
    """The sizes of a run."""
    on_gpu = device == "cuda"
    shape = LLAMA if on_gpu else TINY
    shape = replace(shape, layers=options.layers or shape.layers)
    prompt = options.prompt or (98304 if on_gpu else 1536)
    return Bench(
        shape=shape,
        folder=shape.save(folder, 2 * prompt),
        parent=options.parent if on_gpu else None,
        prompt=prompt,
        chunks=options.chunks or ((8192, 2048) if on_gpu else (512, 256)),
        whole=prompt // 3,
        small=4096 if on_gpu else 256,
        many=32 if on_gpu else 4,
        answer=128 if on_gpu else 8,
        lengths=20 if on_gpu else 4,
        # As many layers as fit, of 32. The second one with its answer as long as the model's
        # context, the last ones too short and few to gain anything.
        decoding=tuple(
            (requests, length, options.layers or layers)
            for requests, length, layers in (
                (
                    (16, prompt // 3, 20),
                    (1, prompt * 4 // 3 - 256, 32),
                    (64, 2048, 32),
                    (8, 4096, 32),
                    (1, 4096, 32),
                    (1, 1024, 32),
                )
                if on_gpu
                else ((2, 512, 2), (1, 1536, 2), (4, 64, 2))
            )
        ),
    )
