"""`torch.ops.unisparse.select_blocks`: the kernels as one operator that graphs can hold.

Inside a graph lengths may be symbolic; where the operator runs they are numbers, so that the
kernels can take turns over heads and rows within bounded scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..block_lists import BlockLists
from ..geometry import BlockGeometry
from ..key_intervals import BLOCK_FIELDS, ROW_FIELDS, IntervalTables, interval_tables
from ..masks import MaskProgram, has_intervals
from .head_thresholds import prepare_thresholds, thresholds_of_text, thresholds_on
from .mask_tables import share_logs, tables_of_mask
from .recording import Recordings
from .self_check import failure_of
from .settings import KernelSettings, decode_settings, encode_settings

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
# Where the tables of masks are made by them too.
KERNELS = "cuda"
# The selection counts both lists of a row in one 32-bit integer.
MAX_KEY_BLOCKS = 2**15 - 1
# Below it there is neither bfloat16 nor a copy into shared memory that nobody waits for.
LEAST_CAPABILITY = (8, 0)
# What the project measures; others prove themselves when they are first used.
MEASURED = ((9, 0),)

_recordings = Recordings()

_library = torch.library.Library("unisparse", "FRAGMENT")
_library.define(
    "select_blocks(Tensor query, Tensor key, float scale, str settings, SymInt? causal_offset, "
    "SymInt? kv_len=None, Tensor[]? intervals=None) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "key_intervals(str mask, Tensor[] tensors, SymInt[] numbers, *, SymInt batch, SymInt q_len, "
    "SymInt kv_len, SymInt? causal_offset, int block_size, int c_q, int c_k, "
    "int sampled_queries, int sink_blocks, int last_query_blocks, Device device) -> Tensor[]"
)


def obstacle(query: Tensor, key: Tensor, geometry: BlockGeometry, scale: float) -> str | None:
    """Why the kernels cannot select for a call without an ``attn_mask``; ``None`` where they can.

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D].
        geometry: The block grid; its mask, where it has one, must be one of intervals.
        scale: Factor on the logits.
    """
    found = keys_obstacle(query)
    if found is not None:
        return found
    if key.dtype != query.dtype:
        return "they need queries and keys of one dtype"
    if geometry.mask is not None and not has_intervals(geometry.mask.expr):
        return "they need a mask under which each row sees one run of keys"
    # They know a row's own position where the call is whole or causal.
    if geometry.is_part and (geometry.causal_offset is None or geometry.mask is not None):
        return "they need all rows of a call that is not plainly causal"
    if scale <= 0:
        return "they need a scale above 0"
    if not guard_or_false(geometry.num_kv_blocks <= MAX_KEY_BLOCKS):
        return f"they take at most {MAX_KEY_BLOCKS} blocks of keys"
    return None


def select_lists(
    query: Tensor,
    key: Tensor,
    settings: KernelSettings,
    *,
    geometry: BlockGeometry,
    scale: float,
    are_composites: bool = False,
) -> BlockLists:
    """Scores and selects by the kernels, for a call without an `obstacle`.

    Args:
        query: [B, Hq, Sq, D].
        key: [B, Hkv, Skv, D], or composite keys.
        settings: How blocks are scored, and which are kept.
        geometry: The block grid.
        scale: Factor on the logits, above 0.
        are_composites: Whether ``key`` holds what `pool_keys` made of the keys.

    Returns:
        Block lists of B batches and Hq heads.
    """
    settings = settings.of_part(geometry)
    if settings.head_thresholds:
        prepare_thresholds(settings.head_thresholds, query.shape[1], query.device)
    intervals = None
    if geometry.mask is not None:
        intervals = list(geometry.mask.prepared) or prepare_mask(
            settings, geometry, query.shape[0], query.device
        )
    kv_len = geometry.kv_len if are_composites else None
    offset, text = geometry.causal_offset, encode_settings(*settings)
    return BlockLists(
        *torch.ops.unisparse.select_blocks(query, key, scale, text, offset, kv_len, intervals)
    )


def select_lists_from_pages(
    query: Tensor,
    pages: Tensor,
    table: Tensor,
    means: Tensor,
    settings: KernelSettings,
    *,
    geometry: BlockGeometry,
    scale: float,
) -> BlockLists:
    """`select_lists` for the keys of one sequence in the pages of a cache; eager only.

    Args:
        query: [1, Hq, Sq, D].
        pages: [all pages, Hkv, P, D], for which `supports_pages` holds.
        table: int32 [n], the sequence's pages in order.
        means: [all pages, Hkv, R, D], those of `pages.PageSummaries`.
        settings: How blocks are scored, and which are kept.
        geometry: The block grid, without a mask.
        scale: Factor on the logits, above 0.
    """
    from .lists import compute_lists_from_pages

    settings = settings.of_part(geometry)
    if settings.head_thresholds:
        prepare_thresholds(settings.head_thresholds, query.shape[1], query.device)
    thresholds = thresholds_on(settings, query.device)

    def compute() -> tuple[Tensor, ...]:
        return compute_lists_from_pages(
            query,
            pages,
            table,
            means,
            settings,
            geometry=geometry,
            scale=scale,
            head_thresholds=thresholds[0] if thresholds else None,
        ).tensors()

    kind = ("pages", settings, geometry, scale)
    with on_device(query.device):
        inputs = (query, pages, table, means, *thresholds)
        return BlockLists(*_recordings.run(kind, inputs, compute))


def supports_pages(pages: Tensor, block_size: int) -> bool:
    """Whether the kernels read keys in pages, [all pages, Hkv, P, D] on the GPU, without a copy."""
    from .score import supports_pages as supports

    return supports(pages, block_size)


def summarize_pages(
    pages: Tensor, means: Tensor, units: tuple[Tensor, Tensor, Tensor] | None, slots: Tensor
) -> None:
    """`pages.PageSummaries.update` on the GPU."""
    from .pages import summarize

    with on_device(pages.device):
        summarize(pages, means, units, slots)


def summarize_rows(keys: Tensor, *tensors: Tensor, **settings: Any) -> None:
    """`pages.summarize_rows` on the GPU; the arguments are those of its kernel's launcher."""
    from .rows import summarize_rows as launch

    with on_device(keys.device):
        launch(keys, *tensors, **settings)


def name_pages(lists: BlockLists, table: Tensor, *tensors: Tensor, **settings: Any) -> None:
    """`pages.name_pages` on the GPU; the arguments are those of its kernel's launcher."""
    from .pages import name_pages as launch

    with on_device(table.device):
        launch(lists, table, *tensors, **settings)


def choose_units(query: Tensor, *tensors: Tensor, **settings: Any) -> None:
    """`pages.choose_units` on the GPU; the arguments are those of its kernels' launcher."""
    from .decode import choose_units as launch

    with on_device(query.device):
        launch(query, *tensors, **settings)


def prepare_mask(
    settings: KernelSettings, geometry: BlockGeometry, batch: int, device: torch.device
) -> list[Tensor]:
    """The tables of `key_intervals.interval_tables` for a geometry whose mask is of intervals."""
    mask = geometry.mask
    assert mask is not None
    make: Any = torch.ops.unisparse.key_intervals
    if device.type == KERNELS:
        share_logs(settings.c_k, device)
        if _is_plain(mask.named):
            # The way through the dispatcher takes as long as all that happens here.
            make = _make_tables
    tables: list[Tensor] = make(
        mask.text,
        mask.named,
        mask.numbers,
        batch=batch,
        q_len=geometry.q_len,
        kv_len=geometry.kv_len,
        causal_offset=geometry.causal_offset,
        block_size=geometry.block_size,
        c_q=settings.c_q,
        c_k=settings.c_k,
        sampled_queries=settings.sampled_queries,
        sink_blocks=settings.sink_blocks,
        last_query_blocks=settings.last_query_blocks,
        device=device,
    )
    return tables


def _is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether nobody records or replaces what happens to some tensors."""
    return (
        {type(tensor) for tensor in tensors} == {Tensor}
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def pool_keys(key: Tensor, *, c_k: int, block_size: int, blocks: int) -> Tensor:
    """Composite keys by the kernels, of key [B, Hkv, Skv, D] on a GPU that has them; eager only.

    Returns:
        [B, Hkv, blocks * block_size / c_k, D] in key's dtype.
    """
    from .lists import pool_keys as pool

    with on_device(key.device):
        return pool(key, group=c_k, block_size=block_size, blocks=blocks)


def supports_keys(key: Tensor) -> bool:
    """Whether the kernels can pool key [B, Hkv, Skv, D]."""
    return keys_obstacle(key) is None


def keys_obstacle(key: Tensor) -> str | None:
    """Why the kernels cannot read key [B, Hkv, Skv, D]; ``None`` where they can."""
    if key.device.type != "cuda":
        return "they need a CUDA device"
    found = _device_obstacle(key.device.index or 0)
    if found is not None:
        return found
    if key.dtype not in DTYPES:
        return "they take float16, bfloat16 and float32"
    return None if key.shape[3] <= MAX_HEAD_DIM else f"they take a head_dim up to {MAX_HEAD_DIM}"


@torch.compiler.assume_constant_result
def _device_obstacle(device: int) -> str | None:
    if inductor_config.cpp_wrapper:
        return "the C++ wrapper of an ahead-of-time package cannot run an operator in Python"
    return _build_obstacle(device)


@cache
def _build_obstacle(device: int) -> str | None:
    if torch.version.hip is not None:
        return "they were run on no AMD GPU"
    if find_spec("triton") is None:
        return "triton is not installed"
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        least, here = (".".join(map(str, capability)) for capability in (LEAST_CAPABILITY, found))
        return f"they need compute capability {least}, got {here}"
    failure = "" if found in MEASURED else failure_of(device, select_lists)
    return f"they fail on this GPU: {failure}" if failure else None


def _run(
    query: Tensor,
    key: Tensor,
    scale: float,
    settings: str,
    causal_offset: int | None,
    kv_len: int | None = None,
    intervals: list[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    thresholds = thresholds_of_text(settings, query.device)

    def compute() -> tuple[Tensor, ...]:
        # Triton need not be there for what runs on the CPU.
        from .lists import compute_lists

        given = decode_settings(settings)
        return compute_lists(
            query,
            key,
            given,
            geometry=BlockGeometry(
                q_len=query.shape[2],
                kv_len=key.shape[2] if kv_len is None else kv_len,
                block_size=given.block_size,
                causal_offset=causal_offset,
            ),
            scale=scale,
            are_composites=kv_len is not None,
            intervals=None if intervals is None else IntervalTables(*intervals),
            head_thresholds=thresholds[0] if thresholds else None,
        ).tensors()

    kind = (scale, settings, causal_offset, kv_len)
    with on_device(query.device):
        inputs = (query, key, *(intervals or ()), *thresholds)
        return tuple(_recordings.run(kind, inputs, compute))


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device the current one: Triton launches there, whatever tensors are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _describe(
    query: Tensor,
    key: Tensor,
    scale: float,
    settings: str,
    causal_offset: int | None,
    kv_len: int | None = None,
    intervals: list[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    block_size = decode_settings(settings).block_size
    batch, heads, q_len = query.shape[:3]
    kv_len = key.shape[2] if kv_len is None else kv_len
    geometry = BlockGeometry(q_len=q_len, kv_len=kv_len, block_size=block_size)
    counts = (batch, heads, geometry.num_q_blocks)
    shapes = (counts, (*counts, geometry.num_kv_blocks)) * 2
    return tuple(query.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _make_tables(
    mask: str,
    tensors: list[Tensor],
    numbers: list[int],
    *,
    batch: int,
    q_len: int,
    kv_len: int,
    causal_offset: int | None,
    block_size: int,
    device: torch.device,
    **settings: int,
) -> list[Tensor]:
    geometry = BlockGeometry(
        q_len=q_len, kv_len=kv_len, block_size=block_size, causal_offset=causal_offset
    )
    if device.type == KERNELS:
        with on_device(device):
            return tables_of_mask(
                mask, tensors, numbers, geometry=geometry, batch=batch, device=device, **settings
            )
    program = MaskProgram.parse(
        mask, tensors=tensors, numbers=numbers, batch=batch, q_len=q_len, kv_len=kv_len
    )
    return interval_tables(replace(geometry, mask=program), device, **settings).tensors()


def _describe_tables(
    mask: str,
    tensors: list[Tensor],
    numbers: list[int],
    *,
    batch: int,
    q_len: int,
    kv_len: int,
    block_size: int,
    c_q: int,
    c_k: int,
    sampled_queries: int,
    device: torch.device,
    **_: object,
) -> list[Tensor]:
    geometry = BlockGeometry(q_len=q_len, kv_len=kv_len, block_size=block_size)
    program = MaskProgram.parse(
        mask, tensors=tensors, numbers=numbers, batch=batch, q_len=q_len, kv_len=kv_len
    )
    count = batch if program.varies_in_batch else 1
    q_blocks, kv_blocks = geometry.num_q_blocks, geometry.num_kv_blocks
    shapes: list[tuple[int, ...]] = [
        (count, q_len, 2),
        (count, q_blocks * (block_size // c_q) if c_q else 0, ROW_FIELDS),
        (count, q_blocks * sampled_queries, ROW_FIELDS),
        (count, q_blocks, BLOCK_FIELDS),
        (count, kv_blocks),
    ]
    return [
        *(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes),
        torch.empty((count, kv_blocks * (block_size // c_k)), device=device),
        *(
            torch.empty((count, length), dtype=torch.bool, device=device)
            for length in (kv_len, q_len)
        ),
    ]


_library.impl("key_intervals", _make_tables, "CompositeExplicitAutograd")
torch.library.register_fake("unisparse::key_intervals", _describe_tables, lib=_library)
_library.impl("select_blocks", _run, "CUDA")
torch.library.register_fake("unisparse::select_blocks", _describe, lib=_library)
