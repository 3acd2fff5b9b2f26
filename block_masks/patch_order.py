"""Patch order: the tokens of an image or a video, reordered so that a block is a tile of it.

Symbols: T frames, H/W rows and columns of patches, t/h/w those of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from .selectors import DenseSpan, Selector
from .validation import validate_int

# Start, length and tile length along one axis.
Span = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchOrder:
    """Tile order of a grid of patches, for attention that is not causal.

    In raster order (frame by frame, row by row) a block of consecutive tokens is a thin strip of
    one frame. In tile order it is a box of ``tile`` patches, which are alike and near, so that
    fewer blocks hold what a block of queries attends to.

    The whole tiles come first, in raster order of tiles: where the tile's volume is the block
    size, each is exactly one block, and where it divides it, a block is some consecutive tiles.
    What is left where the grid is no multiple of the tile follows: the cut tiles, by which axes
    cut them, in raster order. Blocks of these may hold parts of two neighbouring cut tiles, and
    nothing is padded: it is a permutation, and attention over every block stays what it was.

    Text tokens keep their order. They go after the patches, those before first, so that the
    tiles start at a block whatever the length of the text.

    Attributes:
        grid: Patches along each axis, (T, H, W) or (H, W), in raster order.
        tile: Patches of a tile along each axis; (2, 8, 8) or (8, 16) for blocks of 128.
        cell: Patches of a cell, (t, h, w) dividing ``tile``: the patches of a tile are ordered by
            cells likewise, so that selectors which pool consecutive tokens pool boxes too.
            ``None`` for raster order inside a tile.
        text_before: Tokens in front of the patches that are none.
        text_after: Tokens after the patches that are none.

    Raises:
        TypeError: Not tuples of ints, or a text length that is no int.
        ValueError: Axes that are not 2 or 3, sizes below 1, a cell that does not divide the tile.
    """

    grid: tuple[int, ...]
    tile: tuple[int, ...]
    cell: tuple[int, ...] | None = None
    text_before: int = 0
    text_after: int = 0
    _text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _validate_sizes(self.grid, "grid")
        _validate_sizes(self.tile, "tile")
        _validate_axes(self.tile, "tile", self.grid)
        if self.cell is not None:
            _validate_sizes(self.cell, "cell")
            _validate_axes(self.cell, "cell", self.grid)
            if any(t % c for t, c in zip(self.tile, self.cell, strict=True)):
                raise ValueError(
                    f"cell must divide tile {self.tile} along every axis, got {self.cell}; use "
                    "divisors, or None"
                )
        validate_int(self.text_before, "text_before", minimum=0)
        validate_int(self.text_after, "text_after", minimum=0)
        # Dynamo makes numbers symbolic once a second order is met, but not a text.
        lengths = (self.text_before, math.prod(self.grid), self.text_after)
        parts = (self.grid, self.tile, self.cell or self.tile, lengths)
        object.__setattr__(self, "_text", ";".join([",".join(map(str, part)) for part in parts]))

    @property
    def num_patches(self) -> int:
        """Patches of the grid."""
        return self._constants()[3][1]

    @property
    def num_tokens(self) -> int:
        """Patches and text tokens."""
        return sum(self._constants()[3])

    def _constants(self) -> list[list[int]]:
        """Grid, tile, cell, and the lengths of text before, patches and text after."""
        return [[int(n) for n in part.split(",")] for part in self._text.split(";")]

    def permute(self, tensor: Tensor, dim: int = -2) -> Tensor:
        """Brings a dimension of tokens from raster order into tile order.

        Made of views and one concatenation, without indices: differentiable, and traced by
        `torch.compile`. What goes with the tokens (positions, rotary tables, masks of keys) is
        permuted alike.

        Args:
            tensor: Any dtype; ``num_tokens`` along ``dim``.
            dim: The dimension of tokens; that of [B, S, E] and of [B, H, S, D] by default.

        Returns:
            A new tensor of the same shape.

        Raises:
            TypeError: Not a tensor.
            ValueError: Another number of tokens.
        """
        dim = self._validate(tensor, dim)
        grid, _, _, lengths = self._constants()
        before, patches, after = tensor.split(lengths, dim)
        patches = patches.unflatten(dim, grid)
        boxes = [self._flatten_box(patches, dim, box) for box in product(*self._spans())]
        return torch.cat([*boxes, before, after], dim)

    def restore(self, tensor: Tensor, dim: int = -2) -> Tensor:
        """Brings a dimension of tokens back from tile order; the inverse of `permute`.

        Args:
            tensor: Any dtype; ``num_tokens`` along ``dim``, in tile order.
            dim: The dimension of tokens.

        Returns:
            A new tensor of the same shape, in raster order.

        Raises:
            TypeError: Not a tensor.
            ValueError: Another number of tokens.
        """
        dim = self._validate(tensor, dim)
        spans = self._spans()
        boxes = list(product(*spans))
        text_before, _, text_after = self._constants()[3]
        volumes = [math.prod([length for _, length, _ in box]) for box in boxes]
        *parts, before, after = tensor.split([*volumes, text_before, text_after], dim)
        parts = [self._unflatten_box(p, dim, box) for p, box in zip(parts, boxes, strict=True)]
        # Boxes come with the last axis varying fastest: joined along it first.
        for axis in reversed(range(len(spans))):
            count = len(spans[axis])
            groups = [parts[i : i + count] for i in range(0, len(parts), count)]
            parts = [torch.cat(group, dim + axis) for group in groups]
        (patches,) = parts
        return torch.cat([before, patches.flatten(dim, dim + len(spans) - 1), after], dim)

    def permutation(self, device: torch.device | str = "cpu") -> Tensor:
        """Which raster position stands at each place of tile order: int64 [num_tokens].

        ``tensor.index_select(dim, order.permutation(tensor.device))`` is `permute`.
        """
        return self.permute(torch.arange(self.num_tokens, device=device), 0)

    def inverse(self, device: torch.device | str = "cpu") -> Tensor:
        """At which place of tile order each raster position stands: int64 [num_tokens]."""
        return self.restore(torch.arange(self.num_tokens, device=device), 0)

    def keep_text(self, selector: Selector, *, rows: bool = True, keys: bool = True) -> Selector:
        """``selector`` for tokens in tile order, with the text dense.

        Make it once, outside of compiled code.

        Args:
            selector: Which blocks are kept otherwise.
            rows: Blocks of queries that hold text keep every key.
            keys: Blocks of keys that hold text are kept for every query.

        Returns:
            A selector, ``selector`` itself where there is no text.

        Raises:
            ValueError: The tile's volume does not divide the selector's ``block_size``.
        """
        tile = tuple(self._constants()[1])
        volume = math.prod(tile)
        if selector.block_size % volume:
            raise ValueError(
                "tile must have a volume that divides the selector's block_size "
                f"{selector.block_size}, got {tile} of {volume} patches; use one of "
                f"{selector.block_size} patches, or another block_size"
            )
        patches, tokens = self.num_patches, self.num_tokens
        if tokens == patches or not (rows or keys):
            return selector
        return DenseSpan(selector=selector, tokens=f"{patches}:{tokens}", rows=rows, keys=keys)

    def _spans(self) -> list[list[Span]]:
        """Along each axis, the part in whole tiles and the part that is left."""
        grid, tile, *_ = self._constants()
        return [
            [span for span in ((0, n - n % t, t), (n - n % t, n % t, n % t)) if span[1]]
            for n, t in zip(grid, tile, strict=True)
        ]

    def _box_shape(self, box: Sequence[Span]) -> list[tuple[int, int, int]]:
        """Along each axis: tiles, cells of a tile, patches of a cell."""
        cell = self._constants()[2]
        # Along an axis where a cut tile is no multiple of the cell, its cells are as long as it is.
        cells = [t if t % c else c for (_, _, t), c in zip(box, cell, strict=True)]
        return [(length // t, t // c, c) for (_, length, t), c in zip(box, cells, strict=True)]

    def _flatten_box(self, patches: Tensor, dim: int, box: Sequence[Span]) -> Tensor:
        for axis, (start, length, _) in enumerate(box):
            patches = patches.narrow(dim + axis, start, length)
        for axis, sizes in reversed(list(enumerate(self._box_shape(box)))):
            patches = patches.unflatten(dim + axis, sizes)
        axes = len(box)
        # [tiles, cells, patches] of each axis become tiles of all, cells of all, patches of all.
        by_level = [dim + 3 * axis + level for level in range(3) for axis in range(axes)]
        order = [*range(dim), *by_level, *range(dim + 3 * axes, patches.dim())]
        return patches.permute(order).flatten(dim, dim + 3 * axes - 1)

    def _unflatten_box(self, tokens: Tensor, dim: int, box: Sequence[Span]) -> Tensor:
        shape = self._box_shape(box)
        axes = len(box)
        tokens = tokens.unflatten(dim, [sizes[level] for level in range(3) for sizes in shape])
        by_axis = [dim + level * axes + axis for axis in range(axes) for level in range(3)]
        tokens = tokens.permute([*range(dim), *by_axis, *range(dim + 3 * axes, tokens.dim())])
        for axis in range(axes):
            tokens = tokens.flatten(dim + axis, dim + axis + 2)
        return tokens

    def _validate(self, tensor: Tensor, dim: int) -> int:
        """``dim`` counted from the front."""
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensor must be a torch.Tensor, got {type(tensor).__name__}")
        if not -tensor.dim() <= dim < tensor.dim():
            raise ValueError(
                f"dim must be one of the {tensor.dim()} dimensions of {list(tensor.shape)}, got "
                f"{dim}; give that of the tokens"
            )
        if tensor.shape[dim] != self.num_tokens:
            raise ValueError(
                f"tensor must hold {self.num_tokens} tokens along dim {dim} (text_before "
                f"{self.text_before}, grid {self.grid}, text_after {self.text_after}), got shape "
                f"{list(tensor.shape)}; make the PatchOrder for this sequence"
            )
        return dim % tensor.dim()


def _validate_sizes(sizes: object, name: str) -> None:
    if not isinstance(sizes, tuple):
        raise TypeError(
            f"{name} must be a tuple of ints, (T, H, W) or (H, W), got {sizes!r} of type "
            f"{type(sizes).__name__}"
        )
    if len(sizes) not in (2, 3):
        raise ValueError(
            f"{name} must have 2 or 3 axes, (H, W) or (T, H, W), got {sizes}; one axis needs no "
            "order"
        )
    for axis, size in enumerate(sizes):
        validate_int(size, f"{name}[{axis}]", minimum=1)


def _validate_axes(sizes: tuple[int, ...], name: str, grid: tuple[int, ...]) -> None:
    if len(sizes) != len(grid):
        raise ValueError(
            f"{name} must have as many axes as grid {grid}, got {sizes}; give one size an axis"
        )
