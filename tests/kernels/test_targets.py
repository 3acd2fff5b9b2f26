"""Every kernel compiles for every GPU that it is meant for, within its memory, without a GPU."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from unisparse_flex.block_masks import BlockGeometry, UniSparse
from unisparse_flex.block_masks.kernels import gpu, operator, settings_of
from unisparse_flex.block_masks.key_intervals import IntervalTables, interval_tables
from unisparse_flex.block_masks.masks import MaskProgram, RowEnds
from unisparse_flex.block_masks.pages import DecodeSelector

triton: Any = pytest.importorskip("triton")
compiler: Any = pytest.importorskip("triton.backends.compiler")

KIB = 1024


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        arch: As Triton names it.
        shared_memory: Bytes of shared memory that a program may take.
        warp: Threads of a warp.
        like: Whether its code is another target's but for the last step, which two kernels show.
    """

    arch: int | str
    shared_memory: int
    warp: int = 32
    like: bool = False

    @property
    def is_amd(self) -> bool:
        return isinstance(self.arch, str)

    @property
    def gpu(self) -> gpu.Gpu:
        if isinstance(self.arch, str):
            return gpu.Gpu((9, 4), is_amd=True)
        return gpu.Gpu.of_capability((self.arch // 10, self.arch % 10))

    def __str__(self) -> str:
        return str(self.arch) if self.is_amd else f"sm_{self.arch}"


TARGETS = (
    Target(80, 163 * KIB),
    Target(86, 99 * KIB, like=True),
    Target(89, 99 * KIB, like=True),
    Target(90, 227 * KIB),
    Target(100, 227 * KIB),
    Target(120, 99 * KIB),
    Target("gfx942", 64 * KIB, warp=64),
    Target("gfx950", 160 * KIB, warp=64, like=True),
    Target("gfx1100", 64 * KIB),
)


@dataclass(frozen=True)
class Call:
    """A call of 32 query heads and 8 key heads, whose kernels are compiled.

    Attributes:
        dtype: Of its tensors.
        head_dim: D.
        length: Query rows and keys.
        masked: Whether it has padding.
        kernels: Those that this call adds; the scores of composites alone are ``coarse``, of
            sampled rows ``fine``.
        paged: Whether its keys lie in pages.
        per_head: Whether heads have thresholds of their own.
    """

    dtype: torch.dtype
    head_dim: int
    length: int
    masked: bool
    kernels: tuple[str, ...]
    paged: bool = False
    per_head: bool = False


CALLS = (
    Call(torch.bfloat16, 128, 32768, False, ("fine", "select", "coarse", "pool")),
    Call(torch.bfloat16, 128, 32768, True, ("coarse", "select")),
    Call(torch.bfloat16, 128, 32768, False, ("select",), per_head=True),
    Call(torch.float32, 128, 4096, False, ("fine",)),
    Call(torch.float16, 64, 2048, False, ("score_both", "pool")),
    Call(
        torch.bfloat16,
        128,
        1024,
        True,
        (
            *("score_both", "pool"),
            *("key_blocks", "nearest_blocks", "row_blocks", "last_blocks"),
            *("read_rows", "read_keys", "join_keys", "read_facts", "turn_keys"),
        ),
    ),
    Call(torch.bfloat16, 256, 32768, True, ("fine",)),
    Call(
        torch.bfloat16,
        128,
        32768,
        False,
        (
            *("fine", "pool_pages", "name_pages", "summarize", "summarize_rows"),
            *("estimate", "choose"),
        ),
        True,
    ),
)


@dataclass(frozen=True)
class Launched:
    """A launch that was not made."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        name: str = self.kernel.fn.__name__.removeprefix("_")
        if name == "score":
            return "fine" if self.constants["KEY_GROUP"] == 1 else "coarse"
        return name


def launches(target: Target) -> list[Launched]:
    """What the launchers choose for a GPU, as `CALLS` says."""
    from unisparse_flex.block_masks.kernels import (
        decode,
        intervals,
        launch,
        lists,
        pages,
        read,
        rows,
        score,
        select,
        turn,
    )

    found: dict[str, Launched] = {}
    with pytest.MonkeyPatch.context() as patch:
        for module in (gpu, score, select):
            patch.setattr(module, "gpu_of", lambda _: target.gpu)

        def note(self: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
            made = Launched(self._kernel, grid, arguments, constants)
            if made.name in call.kernels:
                found[f"{made.name} {call.dtype} {constants}"] = made

        patch.setattr(launch.Launch, "__call__", note)
        for call in CALLS:
            if call.paged:
                compute_paged(lists, pages, call)
                decode_paged(decode, pages, call)
                decode_rows(decode, rows, call)
            else:
                compute(lists, call)
            if call.masked:
                make_tables(intervals, call)
                read_masks(read, call)
                turn.turn(
                    torch.empty((2, call.length), dtype=torch.bool, device="meta"),
                    batch=2,
                    q_len=call.length,
                    kv_len=call.length,
                    block_size=128,
                )
    return list(found.values())


def compute(lists: Any, call: Call) -> None:
    """The default selector's kernels on tensors without memory."""
    shape = (1, 32, call.length, call.head_dim)
    query = torch.empty(shape, dtype=call.dtype, device="meta")
    options: dict[str, Any] = {"c_q": 16, "c_k": 64, "sampled_queries": 4}
    thresholds = (0.01,) * 32 if call.per_head else None
    selector = UniSparse(
        top_p=0.9,
        threshold=None if call.per_head else 0.01,
        head_thresholds=thresholds,
        threshold_blocks=64,
        **options,
    )
    geometry = BlockGeometry(q_len=call.length, kv_len=call.length, block_size=128, causal_offset=0)
    lists.compute_lists(
        query,
        query[:, :8].contiguous(),
        settings_of(selector),
        geometry=geometry,
        scale=0.1,
        intervals=tables(call.length, options) if call.masked else None,
        head_thresholds=torch.empty(32, device="meta") if call.per_head else None,
    )


def make_tables(intervals: Any, call: Call) -> None:
    """Those of a padded batch of documents, and of rows whose ends are given."""

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch, length = 2, call.length
    ids, flags = empty(batch, length), empty(batch, length, dtype=torch.bool)
    geometry = BlockGeometry(q_len=length, kv_len=length, block_size=128, causal_offset=0)
    for ends in (
        RowEnds(row_ids=ids, ids=ids, order=ids, sees=flags, key_valid=flags),
        RowEnds(last_offset=0, first_offset=-500, lasts=ids, firsts=ids, gaps=flags),
    ):
        intervals.make_tables(
            ends,
            empty(65, dtype=torch.float32),
            geometry,
            batch=batch,
            c_q=16,
            c_k=64,
            sampled_queries=4,
            sink_blocks=1,
            last_query_blocks=1,
        )


def read_masks(read: Any, call: Call) -> None:
    """A batch of masks, as truths and as entries."""
    for dtype in (torch.bool, call.dtype):
        read.read(
            torch.empty((2, call.length, call.length), dtype=dtype, device="meta"), call.length
        )


def compute_paged(lists: Any, pages: Any, call: Call) -> None:
    """The same for a sequence whose keys lie in pages, and what is made beside a selection."""

    def empty(*shape: int, dtype: torch.dtype = call.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    blocks = call.length // 128
    keys = empty(blocks, 8, 128, 2 * call.head_dim)[..., : call.head_dim]
    means, table = empty(blocks, 8, 1, call.head_dim), empty(blocks, dtype=torch.int32)
    geometry = BlockGeometry(q_len=call.length, kv_len=call.length, block_size=128, causal_offset=0)
    slots = empty(call.length, dtype=torch.int64)
    pages.summarize(keys, means, None, slots)
    found = lists.compute_lists_from_pages(
        empty(1, 32, call.length, call.head_dim),
        keys,
        table,
        means,
        settings_of(UniSparse(top_k=20)),
        geometry=geometry,
        scale=0.1,
    )
    pages.name_pages(
        found,
        table,
        empty(32 * blocks, blocks, dtype=torch.int32),
        empty(32 * blocks, dtype=torch.int32),
        empty(1, dtype=torch.int64),
        geometry=geometry,
        page=128,
        group=4,
        heads=32,
        steps=(8, 1),
        first=0,
    )


def decode_paged(decode: Any, pages: Any, call: Call) -> None:
    """Tokens of 16 requests of that length."""

    def empty(*shape: int, dtype: torch.dtype = call.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    blocks = call.length // 128
    keys = empty(16 * blocks, 8, 128, 2 * call.head_dim)[..., : call.head_dim]
    means = empty(16 * blocks, 8, 1, call.head_dim)
    numbers = empty(16 * blocks, 8, 4, 2, call.head_dim, dtype=torch.int8)
    scales = empty(16 * blocks, 8, 4, 2)
    pinned = empty(16 * blocks, 8, 4, dtype=torch.uint8)
    pages.summarize(keys, means, (numbers, scales, pinned), empty(16, dtype=torch.int64))
    decode.choose_units(
        empty(16, 32, call.head_dim),
        numbers,
        scales,
        pinned,
        empty(16, blocks, dtype=torch.int32),
        empty(16, dtype=torch.int32),
        empty(16 * 8, 4 * blocks, dtype=torch.int32),
        empty(16 * 8, dtype=torch.int32),
        empty(2, dtype=torch.int64),
        unit=32,
        rule=DecodeSelector(top_p=0.9).rule,
        scale=0.1,
        steps=(32, 4, 1),
    )


def decode_rows(decode: Any, rows: Any, call: Call) -> None:
    """The same where the keys of a sequence lie one after the other, and a whole prompt of them."""

    def empty(*shape: int, dtype: torch.dtype = call.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    units = call.length // 32
    numbers = empty(16, 8, units, 2, call.head_dim, dtype=torch.int8)
    scales = empty(16, 8, units, 2)
    lengths = empty(16, dtype=torch.int32)
    keys = empty(16, 8, call.length, call.head_dim)
    for count in (1, call.length):
        rows.summarize_rows(keys, lengths, numbers, scales, rows=count, unit=32)
    decode.choose_units(
        empty(16, 32, call.head_dim),
        numbers,
        scales,
        empty(16, 8, units, dtype=torch.uint8),
        empty(16, 1, dtype=torch.int32),
        lengths,
        empty(16 * 8, units, dtype=torch.int32),
        empty(16 * 8, dtype=torch.int32),
        empty(2, dtype=torch.int64),
        unit=32,
        rule=DecodeSelector(top_p=0.9).rule,
        scale=0.1,
        steps=(0, 0, 1),
    )


def tables(length: int, options: dict[str, Any]) -> IntervalTables:
    """Those of a padded batch, without memory."""
    padding = torch.arange(length)[None] > 5
    mask = MaskProgram.parse("t0[b, kv]", tensors=[padding], batch=1, q_len=length, kv_len=length)
    geometry = BlockGeometry(
        q_len=length, kv_len=length, block_size=128, causal_offset=0, mask=mask
    )
    made = interval_tables(geometry, padding.device, sink_blocks=1, last_query_blocks=1, **options)
    return IntervalTables(*(getattr(made, f.name).to("meta") for f in fields(made)))


class Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, target: Target) -> None:
        kind = "hip" if target.is_amd else "cuda"
        self.target = compiler.GPUTarget(kind, target.arch, target.warp)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


@contextmanager
def driving(target: Target) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", Driver(target))
        yield


def stack_of(compiled: Any, folder: Path) -> int:
    """Bytes of a thread's registers that a kernel for NVIDIA's GPUs keeps in memory."""
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    report = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    [taken] = re.findall(r"STACK:(\d+) \S+ LOCAL:(\d+)", report.stdout)
    return sum(map(int, taken))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_kernels_fit(target: Target, tmp_path: Path) -> None:
    made = launches(target)
    names = {name for call in CALLS for name in call.kernels}
    # The B200's registers do not suffice for it.
    apart = {"score_both"} if target.arch == 100 else set()
    assert {launch.name for launch in made} == names - apart
    if target.like:
        made = [launch for launch in made if launch.name in ("coarse", "fine")][:2]
    found: dict[str, tuple[int, int]] = {}
    with driving(target):
        for launch in made:
            launch.kernel.device_caches.clear()
            compiled = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.constants)
            # AMD's are compiled to be ready for somebody who has one; none is used yet.
            stack = 0 if target.is_amd else stack_of(compiled, tmp_path)
            found[f"{launch.name} {launch.constants}"] = compiled.metadata.shared, stack
            launch.kernel.device_caches.clear()
    for name, (shared, stack) in found.items():
        assert shared <= target.shared_memory, name
        assert not stack, name


def test_the_targets_are_those_that_the_kernels_run_on() -> None:
    named = [target.gpu.capability for target in TARGETS if not target.is_amd]
    assert min(named) == operator.LEAST_CAPABILITY
    assert set(operator.MEASURED) <= set(named)


def test_old_and_new_ways_of_reading_keys_are_both_compiled() -> None:
    ways = {t.arch: t.gpu.reads_tensor_maps for t in TARGETS if not t.is_amd}
    assert ways == {80: False, 86: False, 89: False, 90: True, 100: True, 120: True}
