"""A GPU of a kind that nobody measured proves itself: small selections beside plain PyTorch's.

What was found is remembered on disk, until the driver, torch, triton or the kernels change.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from ..block_lists import BlockLists
from ..block_selection import BlockSelection
from ..geometry import BlockGeometry
from ..granularity import Pooled, Sampled
from ..installation import cache_folder
from ..mask_summary import MaskSummary, summarize
from ..masks import MaskProgram
from ..scoring import compute_mean_scores, default_scale
from ..selection import Threshold, select_blocks
from .settings import KernelSettings, spell

logger = logging.getLogger(__name__)

# `operator.select_lists`.
Compute = Callable[..., BlockLists]

BLOCK, C_Q, C_K, SAMPLED = 128, 16, 32, 4
HEADS, KEY_HEADS, LENGTH, HEAD_DIM = 4, 2, 1000, 128
# So that a fault shows in some block, whichever way it shifts mass.
THRESHOLDS = (0.02, 0.06, 0.15)
# Relative error of a score that may decide: five times what bfloat16 was seen to make.
SLACK = 0.05


def failure_of(device: int, compute: Compute) -> str:
    """What the kernels do wrong on a GPU, or empty; found out once for its kind.

    Logs a warning where they fail. Safe inside a graph that is being traced.
    """
    # Modes of tracing are a thread's own.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_selection_failure, device, compute).result()


def find_failure(device: torch.device, compute: Compute) -> str:
    """Compares selections with plain PyTorch's; empty where they are the same.

    Args:
        device: Where they are made.
        compute: The kernels.
    """
    for dtype, padding in ((torch.bfloat16, 0), (torch.float32, 37)):
        query, key = _draw(dtype, device)
        geometry = _geometry(padding, device)
        mask = summarize(None, geometry, c_q=C_Q, c_k=C_K, device=device)
        scores = compute_mean_scores(
            query,
            key,
            geometry=geometry,
            granularities=[Pooled(q=C_Q, k=C_K), Sampled(queries=SAMPLED)],
            scale=default_scale(HEAD_DIM),
            mask=mask,
        )
        for threshold in THRESHOLDS:
            try:
                lists = compute(
                    query,
                    key,
                    _settings(threshold),
                    geometry=geometry,
                    scale=default_scale(HEAD_DIM),
                )
            except Exception as error:
                # A compiler's or a launch's: whatever it is, plain PyTorch still selects.
                found = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            else:
                found = _difference(lists, scores, geometry, mask, threshold)
            if found:
                masked = "with padding" if padding else "without a mask"
                return f"{str(dtype).removeprefix('torch.')} {masked}: {found}"
    return ""


def _draw(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Query and key whose logits vary from block to block."""
    generator = torch.Generator().manual_seed(0)

    def tokens(heads: int) -> Tensor:
        def noise(count: int) -> Tensor:
            return torch.randn((2, heads, count, HEAD_DIM), generator=generator)

        drift = noise(-(-LENGTH // 64)).repeat_interleave(64, dim=2)[:, :, :LENGTH]
        return (noise(LENGTH) * 0.5 + drift * 1.5).to(device, dtype)

    return tokens(HEADS), tokens(KEY_HEADS)


def _settings(threshold: float) -> KernelSettings:
    """One sink and the diagonal, and what a threshold keeps."""
    rule = spell(Threshold(threshold=threshold))
    return KernelSettings(BLOCK, C_Q, C_K, 1, SAMPLED, *rule, 1, 1, 0)


def _geometry(padding: int, device: torch.device) -> BlockGeometry:
    """Two rows of a batch, causal, one of them padded on the left."""
    mask = None
    if padding:
        valid = torch.arange(LENGTH, device=device) >= torch.tensor([[0], [padding]], device=device)
        mask = MaskProgram.parse("t0[b, kv]", tensors=[valid], batch=2, q_len=LENGTH, kv_len=LENGTH)
    return BlockGeometry(q_len=LENGTH, kv_len=LENGTH, block_size=BLOCK, causal_offset=0, mask=mask)


def _difference(
    lists: BlockLists,
    scores: Tensor,
    geometry: BlockGeometry,
    mask: MaskSummary | None,
    threshold: float,
) -> str:
    """How lists differ from those of plain PyTorch, which selects by ``scores``, or empty."""
    kept = lists.kept()
    most, least = (
        select_blocks(
            scores,
            rule=Threshold(threshold=threshold * factor),
            forced_blocks=_settings(threshold).forced_blocks,
            geometry=geometry,
            mask=mask,
        )[0]
        for factor in (1 - SLACK, 1 + SLACK)
    )
    wrong = int(((kept & ~most) | (least & ~kept)).sum())
    if wrong:
        return f"{wrong} of {kept.numel()} blocks differ from plain PyTorch's"
    visible = geometry.block_bounds(scores.device)[0]
    given = lists.tensors()
    wanted = BlockSelection(keep=kept, visible=visible, geometry=geometry).block_lists()
    for part, kind in ((0, "partial"), (2, "full")):
        listed = (
            torch.arange(given[part + 1].shape[-1], device=kept.device) < wanted[part][..., None]
        )
        same_counts = torch.equal(given[part], wanted[part])
        if not (same_counts and torch.equal(given[part + 1][listed], wanted[part + 1][listed])):
            return f"the lists of {kind} blocks differ from plain PyTorch's"
    return ""


def _selection_failure(device: int, compute: Compute) -> str:
    def find() -> str:
        with torch.cuda.device(device), torch.no_grad():
            return find_failure(torch.device("cuda", device), compute)

    return remembered(
        gpu_kind(device),
        find,
        consequence="the selection kernels fail on this GPU, plain PyTorch selects instead",
    )


def remembered(kind: str, find: Callable[[], str], *, consequence: str) -> str:
    """What is wrong with something, or empty; found once and kept on disk.

    Args:
        kind: What the outcome depends on, see `gpu_kind`.
        find: Finds it.
        consequence: What a warning says in front of it.
    """
    found = known_failure(kind)
    if found is None:
        found = find()
        # A home that cannot be written to: found out again by the next process.
        with suppress(OSError):
            path = _path()
            path.parent.mkdir(parents=True, exist_ok=True)
            written = path.with_suffix(f".{os.getpid()}")
            written.write_text(json.dumps(_read() | {kind: found}, indent=1))
            written.replace(path)
    if found:
        logger.warning("%s: %s; please report this line: %s", consequence, found, kind)
    return found


def known_failure(kind: str) -> str | None:
    """What `remembered` found of a kind, on this machine; ``None`` where it was not asked yet."""
    found = _read().get(kind)
    return found if isinstance(found, str) else None


def _read() -> dict[str, object]:
    """The file, or nothing where it is broken."""
    with suppress(OSError, ValueError):
        known = json.loads(_path().read_text())
        if isinstance(known, dict):
            return known
    return {}


def _path() -> Path:
    """The file of what was found, in the user's cache."""
    return cache_folder() / "self_check.json"


def gpu_kind(device: int) -> str:
    """A GPU with all that the results of kernels depend on."""
    sources = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    kernels = hashlib.sha256(sources).hexdigest()[:12]
    return (
        f"{torch.cuda.get_device_name(device)}, driver {_driver()}, torch {torch.__version__}, "
        f"triton {version('triton')}, kernels {kernels}"
    )


def _driver() -> str:
    """The version of NVIDIA's driver, where it says it."""
    with suppress(OSError):
        words = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].split()
        return next((word for word in words if word[0].isdigit()), "unknown")
    return "unknown"
