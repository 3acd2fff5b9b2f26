"""`unisparse-flex plot`: figures of a tiny model and of files."""

from __future__ import annotations

import json

import pytest
import torch

from tests.api.models import SELECTOR as API_SELECTOR
from tests.api.models import create, embeddings
from unisparse_flex import explain, optimize
from unisparse_flex.cli import failures
from unisparse_flex.reports import DensitySeries, LayerBlocks, collect_blocks, draw_block_maps
from unisparse_flex.reports.figures.block_map_figure import spread, wrap_name

from .conftest import SELECTOR

PNG = b"\x89PNG"


def test_a_model_gives_block_maps_and_densities(run, model_folder, tmp_path):
    options = ("--selector", SELECTOR, "--tokens", "200", "--output", tmp_path)
    ran = run("plot", model_folder, *options, "--json")
    assert ran.code == 0, ran.err
    figures = json.loads(ran.out)["figures"]
    assert figures == [
        str(tmp_path / "block-maps.png"),
        str(tmp_path / "density-by-layer.png"),
    ]
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in figures)


def test_dense_models_have_no_block_map(run, model_folder, tmp_path):
    options = ("--tokens", "200", "--min-length", "300", "--output", tmp_path, "--format", "svg")
    ran = run("plot", model_folder, *options)
    assert ran.code == 0
    assert ran.err == f"wrote {tmp_path / 'density-by-layer.svg'}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["density-by-layer.svg"]


def test_files_of_explain_and_demo_give_densities(run, model_folder, tmp_path):
    explained = tmp_path / "explain.json"
    explained.write_text(run("explain", model_folder, "--tokens", "200", "--json").out)
    demo = tmp_path / "demo.json"
    demo.write_text(json.dumps({"model": "m", "layers": [{"layer": 0, "density": 0.5}]}))
    ran = run("plot", explained, demo, "--output", tmp_path / "out", "--format", "pdf")
    assert ran.code == 0, ran.err
    assert (tmp_path / "out" / "density-by-layer.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "it must hold calls (explain --json) or layers (the demo), got neither"),
        ("{", "cannot read"),
        ('{"layers": []}', "densities must hold at least one call"),
        ('{"layers": [{"density": 2}]}', "density must be a number in [0, 1] or null, got 2"),
        ('{"layers": [{"density": true}]}', "density must be a number in [0, 1] or null, got True"),
        ('{"layers": [1]}', "got neither"),
    ],
)
def test_files_that_hold_no_densities_are_refused(run, tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    ran = run("plot", path, "--output", tmp_path / "out")
    assert ran.code == 2
    assert message in ran.err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sources", [["a", "b"], ["a", "b.json"]])
def test_sources_are_one_model_or_files(run, sources):
    ran = run("plot", *sources)
    assert ran.code == 2
    assert "SOURCE must be one MODEL or files *.json" in ran.said


@pytest.mark.parametrize(
    ("name", "what"),
    [("model.py", "a .py file"), ("weights.bin", "give the folder"), ("LICENSE", "a suffix")],
)
def test_a_file_of_another_kind_is_said_to_be_one(run, tmp_path, name, what):
    (tmp_path / name).write_text("x")
    ran = run("plot", tmp_path / name)
    assert ran.code == 2
    assert "MODEL must be a Hugging Face folder, a file *.gguf or smollm2, or files" in ran.said
    assert what in ran.said
    assert "not there" not in ran.said


@pytest.mark.parametrize("source", ["nowhere.json", "nowhere"])
def test_what_is_not_there_is_said_to_be_missing(run, monkeypatch, tmp_path, source):
    monkeypatch.chdir(tmp_path)
    ran = run("plot", source)
    assert ran.code == 2
    assert ("there is no file nowhere.json" in ran.err) or ("which is not there" in ran.err)


def test_a_folder_that_is_a_file_is_refused_before_anything_is_read(run, model_folder, tmp_path):
    path = tmp_path / "figures"
    path.write_text("x")
    ran = run("plot", model_folder, "--output", path)
    assert ran.code == 2
    assert f"it must be a folder, got {path}, a file" in ran.said


def test_missing_matplotlib_is_named_with_the_command_that_installs_it(run, monkeypatch, tmp_path):
    monkeypatch.setattr(failures, "find_spec", lambda name: None)
    (tmp_path / "x.json").write_text("{}")
    ran = run("plot", tmp_path / "x.json")
    assert ran.code == 1
    assert "pip install 'unisparse-flex[viz]'" in ran.said


def test_collected_blocks_have_the_densities_that_explain_says():
    model = optimize(create(), API_SELECTOR, min_length=0)
    inputs = {"x": embeddings(300)}
    blocks = collect_blocks(model, inputs)
    records = explain(model, **inputs).calls
    assert [layer.layer for layer in blocks] == [record.layer for record in records]
    series = DensitySeries.of("tiny", blocks)
    assert series.densities == pytest.approx([record.density for record in records])
    assert [len(heads) for heads in series.heads] == [4, 4]
    for layer in blocks:
        assert layer.keep is not None
        assert layer.visible is not None
        assert layer.keep.shape == layer.visible.shape == (4, 10, 10)
        assert not (layer.keep & ~layer.visible).any()


def test_dense_calls_keep_their_place_and_reason():
    model = optimize(create(), API_SELECTOR, min_length=0, dense_layers=(0,))
    first, second = collect_blocks(model, {"x": embeddings(300)})
    assert (first.keep, first.reason) == (None, "layer excluded by the settings")
    assert second.keep is not None
    assert DensitySeries.of("tiny", [first, second]).densities[0] is None


def test_pages_hold_six_calls_each(tmp_path):
    keep = torch.ones(2, 4, 4, dtype=torch.bool).tril()
    layer = LayerBlocks(layer="a.0.b", keep=keep, visible=keep, block_size=16, q_len=64, kv_len=64)
    dense = LayerBlocks(layer="c", reason="short")
    paths = draw_block_maps([layer] * 7 + [dense], tmp_path / "maps.png", title="t")
    assert paths == [tmp_path / "maps.png", tmp_path / "maps-2.png"]
    assert all(path.read_bytes().startswith(PNG) for path in paths)
    assert draw_block_maps([dense], tmp_path / "none.png", title="t") == []


@pytest.mark.parametrize(
    ("count", "most", "shown"),
    [(3, 16, [0, 1, 2]), (9, 3, [0, 4, 8]), (32, 1, [0]), (4, 4, [0, 1, 2, 3])],
)
def test_heads_are_spread_evenly(count, most, shown):
    assert spread(count, most) == shown


def test_names_break_at_their_dots():
    assert wrap_name("model.layers.12.self_attn") == ["model.layers.", "12.self_attn"]
    assert wrap_name("attention") == ["attention"]


def test_series_without_calls_or_with_other_heads_are_refused():
    with pytest.raises(ValueError, match="densities must hold at least one call"):
        DensitySeries(name="x", densities=())
    with pytest.raises(ValueError, match="heads must be as many as densities"):
        DensitySeries(name="x", densities=(0.5,), heads=((0.5,), (0.5,)))
