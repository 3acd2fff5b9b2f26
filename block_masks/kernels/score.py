"""Launches of the kernels that score: single and composite rows, one kind alone or both.

Symbols: C composite keys of a key block, Nk key blocks; `score_rows.py` holds what a program does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..geometry import BlockGeometry
from ..key_intervals import IntervalTables
from .gpu import gpu_of
from .launch import Launch
from .recording import empty
from .score_rows import _score_rows
from .scratch import Masses, Rows, batch_stride, power_of_two, reach_of

# Of what is scored, and of the call.
LENGTHS = [
    "stride_bounds",
    "stride_weights",
    "first_row",
    "key_rows",
    "columns",
    "block_rows",
]
CALL_LENGTHS = [
    "stride_blocks",
    "first_head",
    "blocks",
    "q_len",
    "kv_len",
    "offset",
    "kv_heads",
]


@triton.jit(do_not_specialize=LENGTHS + CALL_LENGTHS, do_not_specialize_on_alignment=["table"])
def _score(
    queries,
    keys,
    out,
    totals,
    bounds,
    weights,
    stride_query,
    stride_key_batch,
    stride_key_head,
    stride_key,
    stride_bounds,
    stride_weights,
    first_row,
    rows,
    key_rows,
    columns,
    block_rows,
    block_bounds,
    table,
    stride_blocks,
    first_head,
    blocks,
    q_len,
    kv_len,
    offset,
    kv_heads,
    head_dim,
    scale,
    ROW_GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    COLS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERVALS: tl.constexpr,
    MAPPED: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Scores of sampled rows, or of composite ones."""
    program = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    _score_rows(
        program, tl.program_id(1), tl.num_programs(0), tl.num_programs(2),
        queries, keys, out, totals, bounds, weights, block_bounds, table, stride_query,
        stride_key_batch, stride_key_head, stride_key, stride_bounds, stride_weights, first_row,
        rows, key_rows, columns, block_rows, stride_blocks, first_head, blocks, q_len, kv_len,
        offset, kv_heads, head_dim, scale,
        BLOCK, ROW_GROUP, KEY_GROUP, CAUSAL, EXACT, ROWS, COLS, WIDTH, SPLITS, INTERVALS, MAPPED,
        PAGE,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[prefix + name for prefix in ("fine_", "coarse_") for name in LENGTHS]
    + CALL_LENGTHS
    + ["count"]
)
def _score_both(
    fine_queries,
    fine_keys,
    fine_out,
    fine_totals,
    fine_bounds,
    fine_weights,
    fine_stride_query,
    fine_stride_key_batch,
    fine_stride_key_head,
    fine_stride_key,
    fine_stride_bounds,
    fine_stride_weights,
    fine_first_row,
    fine_rows,
    fine_key_rows,
    fine_columns,
    fine_block_rows,
    coarse_queries,
    coarse_keys,
    coarse_out,
    coarse_totals,
    coarse_bounds,
    coarse_weights,
    coarse_stride_query,
    coarse_stride_key_batch,
    coarse_stride_key_head,
    coarse_stride_key,
    coarse_stride_bounds,
    coarse_stride_weights,
    coarse_first_row,
    coarse_rows,
    coarse_key_rows,
    coarse_columns,
    coarse_block_rows,
    block_bounds,
    stride_blocks,
    first_head,
    blocks,
    q_len,
    kv_len,
    offset,
    kv_heads,
    head_dim,
    scale,
    count,
    FINE_ROW_GROUP: tl.constexpr,
    FINE_KEY_GROUP: tl.constexpr,
    FINE_COLS: tl.constexpr,
    FINE_SPLITS: tl.constexpr,
    COARSE_ROW_GROUP: tl.constexpr,
    COARSE_KEY_GROUP: tl.constexpr,
    COARSE_COLS: tl.constexpr,
    COARSE_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    INTERVALS: tl.constexpr,
    MAPPED: tl.constexpr,
):
    """Scores of sampled rows, which take longer and go first, and of composite ones."""
    program = tl.program_id(0)
    tiles = tl.cdiv(fine_rows, ROWS)
    behind = program - tiles * FINE_SPLITS * count
    if behind < 0:
        split = program // tiles % FINE_SPLITS
        _score_rows(
            program // (tiles * FINE_SPLITS) * tiles + program % tiles, split, tiles, count,
            fine_queries, fine_keys, fine_out, fine_totals, fine_bounds, fine_weights,
            block_bounds, fine_queries, fine_stride_query, fine_stride_key_batch,
            fine_stride_key_head, fine_stride_key, fine_stride_bounds, fine_stride_weights,
            fine_first_row, fine_rows, fine_key_rows, fine_columns, fine_block_rows,
            stride_blocks, first_head, blocks, q_len, kv_len, offset, kv_heads, head_dim, scale,
            BLOCK, FINE_ROW_GROUP, FINE_KEY_GROUP, CAUSAL, EXACT, ROWS, FINE_COLS, WIDTH,
            FINE_SPLITS, INTERVALS, MAPPED, 0,
        )  # fmt: skip
    else:
        tiles = tl.cdiv(coarse_rows, ROWS)
        split = behind // tiles % COARSE_SPLITS
        _score_rows(
            behind // (tiles * COARSE_SPLITS) * tiles + behind % tiles, split, tiles, count,
            coarse_queries, coarse_keys, coarse_out, coarse_totals, coarse_bounds,
            coarse_weights, block_bounds, coarse_queries, coarse_stride_query,
            coarse_stride_key_batch, coarse_stride_key_head, coarse_stride_key,
            coarse_stride_bounds, coarse_stride_weights, coarse_first_row, coarse_rows,
            coarse_key_rows, coarse_columns, coarse_block_rows, stride_blocks, first_head,
            blocks, q_len, kv_len, offset, kv_heads, head_dim, scale,
            BLOCK, COARSE_ROW_GROUP, COARSE_KEY_GROUP, CAUSAL, EXACT, ROWS, COARSE_COLS, WIDTH,
            COARSE_SPLITS, INTERVALS, MAPPED, 0,
        )  # fmt: skip


_launch, _launch_both = Launch(_score), Launch(_score_both)


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes at a time, and with what."""

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """Options of the compilation; AMD's knows no limit of registers."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        # Triton's default changes from version to version.
        fused = {"enable_fp_fusion": True}
        return {"num_warps": self.warps, "num_stages": self.stages, **fused, **limit}


# Up to so many, smaller tiles keep more multiprocessors busy.
FEW_ROWS = 8192


def tile_of(tokens: Tensor, rows: int) -> Tile:
    """The tile for ``rows`` rows of tokens of this dtype and head_dim; columns are not by rows."""
    gpu = gpu_of(tokens.device)
    width = power_of_two(tokens.shape[-1])
    few = rows <= FEW_ROWS
    if gpu.is_amd:
        return Tile(64, 64, 4, 2)
    if tokens.element_size() == 4:
        return Tile(64, 64, 4, 2, 200)
    if not gpu.has_wide_products:
        # Of 32 rows a warp has, what it reads of keys serves twice as many products as of 16.
        stages = 3 if width <= 64 or few else 2
        return Tile(64, 32, 4, stages) if few or width > 128 else Tile(128, 32, 4, stages)
    if width > 128:
        return Tile(128, 64, 8, 2, 128 if gpu.capability < (10, 0) else 200)
    if gpu.capability >= (10, 0):
        return Tile(64, 64, 4, 3, 168)
    if few:
        # Above 64 wide, shared memory has room for three programs: registers for more are free.
        return Tile(64, 64, 4, 3, 128 if width <= 64 else 168)
    # Above 64 wide, shared memory leaves room for two programs, and so for their registers.
    return Tile(128, 64, 8, 3, 80 if width <= 64 else 128)


def held_blocks(tokens: Tensor, per_block: int) -> int:
    """Key blocks in a tile of composite keys, which `pool` must interleave."""
    return max(1, tile_of(tokens, 1).columns // per_block)


def supports_descriptor(keys: Tensor) -> bool:
    """Whether the tensor memory accelerator can address ``keys``."""
    aligned = all(stride * keys.element_size() % 16 == 0 for stride in keys.stride()[:-1])
    return keys.stride(-1) == 1 and aligned and keys.data_ptr() % 16 == 0


def supports_pages(keys: Tensor, block_size: int) -> bool:
    """Whether `score` reads keys in pages, [all pages, Hkv, page, D], where they lie."""
    columns = min(tile_of(keys, 1).columns, block_size)
    return keys.shape[2] % columns == 0 and supports_descriptor(keys)


# Enough programs to even out their differing lengths over the multiprocessors; each begins with a
# tile more, which is little beside rows of single keys.
PROGRAMS_WANTED, PROGRAMS_WANTED_OF_KEYS = 512, 2048
MOST_SPLITS = 16
# Of composite keys and many rows, where lengths share a compilation.
STEADY_SPLITS = 4


def splits_of(programs: int, tiles: int, wanted: int) -> int:
    """Into how many ranges of keys a row's work is split: a power of two.

    Args:
        programs: Programs without a split.
        tiles: Tiles of keys; a range has two or more.
        wanted: Programs that there should be.
    """
    splits = min(power_of_two(-(-wanted // programs)), MOST_SPLITS)
    while splits > max(1, tiles // 2):
        splits //= 2
    return splits


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """Rows, and the keys that they meet.

    Attributes:
        queries: Composite or picked query rows of every head and query block.
        keys: [B, Hkv, C, D] keys, or composite keys, interleaved as `held_blocks` says; such as
            `supports_descriptor` accepts.
        key_group: Keys to a composite key; 1 for the keys themselves.
        columns: Composite keys that exist.
        sampled: Whether the queries were picked, not pooled.
    """

    queries: Rows
    keys: Tensor
    key_group: int
    columns: int
    sampled: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """Which heads and query blocks are scored, of which call; see `score`."""

    geometry: BlockGeometry
    heads: slice
    q_blocks: slice
    scale: float
    intervals: IntervalTables | None
    steady: bool = False

    def rows(self, of: Scored) -> int:
        """Rows of a head."""
        block_rows = of.queries.tokens.shape[1] // self.geometry.num_q_blocks
        return block_rows * (self.q_blocks.stop - self.q_blocks.start)

    @property
    def count(self) -> int:
        """Heads."""
        return self.heads.stop - self.heads.start

    def tile(self, of: Scored) -> Tile:
        """What a program computes at a time."""
        tile = tile_of(of.keys, self.rows(of) * self.count)
        if of.key_group > 1:
            return tile
        # Keys themselves are not interleaved: a tile holds those of one block.
        return replace(tile, columns=min(tile.columns, self.geometry.block_size))

    def splits(self, of: Scored) -> int:
        """Programs that share a row."""
        tile = self.tile(of)
        if self.steady:
            return MOST_SPLITS if of.key_group == 1 or tile.rows <= 64 else STEADY_SPLITS
        programs = -(-self.rows(of) // tile.rows) * self.count
        wanted = PROGRAMS_WANTED_OF_KEYS if of.key_group == 1 else PROGRAMS_WANTED
        return splits_of(programs, -(-of.columns // tile.columns), wanted)

    def programs(self, of: Scored) -> tuple[int, int, int]:
        """Tiles of rows, splits and heads."""
        return -(-self.rows(of) // self.tile(of).rows), self.splits(of), self.count

    def masses(self, of: Scored) -> Masses:
        """Room for the result."""
        shape = (self.count, reach_of(self.geometry, self.q_blocks), self.rows(of))
        dtype = torch.float32 if of.keys.dtype == torch.float32 else torch.bfloat16
        totals = (self.count, 4, self.splits(of), self.rows(of))
        return Masses(empty(of.keys, shape, dtype), empty(of.keys, totals, torch.float32))

    def arguments(self, of: Scored, masses: Masses) -> list[Any]:
        """Those of the kernels that say what is scored."""
        queries, keys = of.queries.tokens, of.keys
        bounds = weights = queries
        if self.intervals is not None:
            tables = self.intervals
            bounds = tables.samples if of.sampled else tables.composites
            valid = tables.key_valid.view(torch.uint8)
            weights = valid if of.key_group == 1 else tables.key_weights
        mapped = _is_mapped(keys)
        block_rows = queries.shape[1] // self.geometry.num_q_blocks
        box = [1, 1, self.tile(of).columns, power_of_two(keys.shape[3])]
        return [
            queries,
            TensorDescriptor(keys, keys.shape, keys.stride(), box) if mapped else keys,
            masses.blocks,
            masses.totals,
            bounds,
            weights,
            queries.stride(0),
            *((0, 0, 0) if mapped else keys.stride()[:3]),
            batch_stride(bounds),
            batch_stride(weights),
            self.q_blocks.start * block_rows,
            self.rows(of),
            keys.shape[2],
            of.columns,
            block_rows,
        ]

    def constants(self, of: Scored) -> dict[str, int]:
        """Those of the kernels that say what is scored."""
        return {
            "ROW_GROUP": of.queries.size,
            "KEY_GROUP": of.key_group,
            "COLS": self.tile(of).columns,
            "SPLITS": self.splits(of),
        }

    def block_bounds(self, of: Scored) -> Tensor:
        """The table of query blocks, or any tensor."""
        return of.queries.tokens if self.intervals is None else self.intervals.blocks

    def call_arguments(self, of: Scored) -> list[Any]:
        """Those of the kernels that say of which call."""
        geometry = self.geometry
        return [
            batch_stride(self.block_bounds(of)),
            self.heads.start,
            reach_of(geometry, self.q_blocks),
            geometry.q_len,
            geometry.kv_len,
            geometry.causal_offset or 0,
            of.keys.shape[1],
            of.keys.shape[3],
            self.scale * math.log2(math.e),
        ]

    def call_constants(self, of: Scored) -> dict[str, Any]:
        """Those of the kernels that say of which call, and how they are compiled."""
        return {
            "BLOCK": self.geometry.block_size,
            "CAUSAL": self.geometry.causal_offset is not None,
            "EXACT": of.keys.dtype == torch.float32,
            "ROWS": self.tile(of).rows,
            "WIDTH": power_of_two(of.keys.shape[3]),
            "INTERVALS": self.intervals is not None,
            "MAPPED": _is_mapped(of.keys),
        }


def _is_mapped(keys: Tensor) -> bool:
    """Whether a unit of its own reads the keys."""
    return gpu_of(keys.device).reads_tensor_maps and keys.dtype != torch.float32


def _fits_both(keys: Tensor, rows: int) -> bool:
    """Whether registers suffice for a program that knows both kinds of rows, of so many each.

    In larger tiles, in float32 and beside the B200's products they do not.
    """
    if rows > FEW_ROWS or keys.dtype == torch.float32 or keys.shape[3] > 128:
        return False
    return gpu_of(keys.device).capability[0] != 10


def score(
    scored: Scored,
    *,
    geometry: BlockGeometry,
    heads: slice,
    q_blocks: slice,
    scale: float,
    intervals: IntervalTables | None = None,
    table: Tensor | None = None,
) -> Masses:
    """Computes each row's summed exponentials in each key block.

    Args:
        scored: Rows and keys.
        geometry: The block grid.
        heads: Which of the B * Hkv key heads.
        q_blocks: Which query blocks.
        scale: Factor on the logits, above 0.
        intervals: What the geometry's mask hides, where it has one.
        table: int32 [pages of the sequence] in order, where keys lie in pages, in which lengths
            share a compilation: work is split alike at every length. Single keys are then those of
            the cache, [all pages, Hkv, page, D], such as `supports_pages` accepts.

    Returns:
        The masses; what is hidden from a whole query block is left unset.
    """
    turn = _Turn(geometry, heads, q_blocks, scale, intervals, steady=table is not None)
    masses = turn.masses(scored)
    paged = table is not None and scored.sampled
    _launch(
        turn.programs(scored),
        *turn.arguments(scored, masses),
        turn.block_bounds(scored),
        table if paged else scored.queries.tokens,
        *turn.call_arguments(scored),
        **turn.constants(scored),
        **turn.call_constants(scored),
        PAGE=scored.keys.shape[2] if paged else 0,
        **turn.tile(scored).options(),
    )
    return masses


def score_both(
    coarse: Scored,
    fine: Scored,
    *,
    geometry: BlockGeometry,
    heads: slice,
    q_blocks: slice,
    scale: float,
    intervals: IntervalTables | None = None,
) -> tuple[Masses, Masses]:
    """`score` for composite rows and for sampled ones, in one launch where both are few."""
    turn = _Turn(geometry, heads, q_blocks, scale, intervals)
    if not _fits_both(fine.keys, max(turn.rows(coarse), turn.rows(fine)) * turn.count):
        options: dict[str, Any] = {"geometry": geometry, "heads": heads, "q_blocks": q_blocks}
        options |= {"scale": scale, "intervals": intervals}
        return score(coarse, **options), score(fine, **options)
    masses = turn.masses(coarse), turn.masses(fine)
    parts = ("FINE_", fine), ("COARSE_", coarse)
    _launch_both(
        (sum(math.prod(turn.programs(part)) for part in (fine, coarse)), 1, 1),
        *turn.arguments(fine, masses[1]),
        *turn.arguments(coarse, masses[0]),
        turn.block_bounds(fine),
        *turn.call_arguments(fine),
        turn.count,
        **{p + name: value for p, part in parts for name, value in turn.constants(part).items()},
        **turn.call_constants(fine),
        **turn.tile(coarse).options(),
    )
    return masses
