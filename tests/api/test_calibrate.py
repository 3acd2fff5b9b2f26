"""`calibrate` reaches its target at least cost, and `optimize` runs what it found."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from unisparse_flex import (
    Calibration,
    UniSparse,
    calibrate,
    explain,
    is_optimized,
    optimize,
    restore,
)
from unisparse_flex.calibrating.run import default_ladder
from unisparse_flex.calibrating.search import KL_PASSES, Plan, Search
from unisparse_flex.calibration import DENSE, MAX_FILE_BYTES, Setting
from unisparse_flex.evaluation.measure import compute_kl, compute_log_probs
from unisparse_flex.evaluation.recall import CaptureAttention, compute_recall
from unisparse_flex.passes import DenseReason
from unisparse_flex.progress import Progress
from unisparse_flex.reports import record_attention
from unisparse_flex.selectors import FlexPrefill

from .capture import captured
from .models import FINE, SELECTOR, Attention, Layer, Transformer, create, embeddings
from .reference import rmse

X = embeddings(400)
LADDER = tuple(
    UniSparse(block_size=16, c_q=4, c_k=4, sampled_queries=4, threshold=t, top_p=0.4)
    for t in (0.2, 0.1, 0.05, 0.02, 0.005)
)
SILENT = Progress("calibrate", shown=False)
TWO: dict[str, Setting] = {"layers.0.attention": SELECTOR, "layers.1.attention": FINE}


class Uneven(Transformer):
    """Layers whose attention is ever more diffuse."""

    def __init__(self) -> None:
        super().__init__(layers=3)
        with torch.no_grad():
            for i, layer in enumerate(self.layers):
                assert isinstance(layer, Layer)
                layer.attention.query.weight.mul_(0.4**i)


def found(model: nn.Module | None = None, **options: Any) -> Calibration:
    options = {"ladder": LADDER, "min_length": 0, **options}
    return calibrate(create(Uneven) if model is None else model, [X], **options)


def with_layers(layers: Mapping[str, Setting]) -> Calibration:
    return Calibration(
        layers=layers,
        quality="recall",
        target=0.9,
        reached=0.95,
        density=0.5,
        model="Transformer",
        unisparse_flex="0.1.0",
        torch="2.13.0",
    )


def dense_calls() -> list[Any]:
    with CaptureAttention() as capture, torch.no_grad():
        create(Uneven)(X)
    return capture.calls


def quality(settings: list[Setting]) -> tuple[float, float]:
    """Mean recall and density of a setting for each layer, by the demo's own measure."""
    recalls, densities = [], []
    for call, setting in zip(dense_calls(), settings, strict=True):
        if isinstance(setting, str):
            recalls.append(1.0)
            densities.append(1.0)
            continue
        selection = setting.select(call.query, call.key, is_causal=True)
        size = setting.block_size
        recalls.append(
            compute_recall(call.query, call.key, selection.keep, block_size=size, row_stride=1)
        )
        densities.append(selection.density())
    return sum(recalls) / len(recalls), sum(densities) / len(densities)


@pytest.mark.parametrize("recall", [0.6, 0.8, 0.95])
def test_the_recall_is_reached_and_no_uniform_setting_that_reaches_it_keeps_less(
    recall: float,
) -> None:
    calibration = found(recall=recall)
    reached, density = quality(list(calibration.layers.values()))
    assert calibration.reached == pytest.approx(reached, abs=1e-5)
    assert calibration.density == pytest.approx(density, abs=1e-6)
    assert calibration.reached >= recall
    uniform = [quality([selector] * 3) for selector in LADDER] + [(1.0, 1.0)]
    rivals = [kept for share, kept in uniform if share >= recall]
    assert calibration.density <= min(rivals) + 1e-6


def test_layers_differ_and_cost_less_than_the_same_setting_for_all() -> None:
    calibration = found(recall=0.8)
    assert len(set(calibration.layers.values())) > 1
    uniform = [quality([selector] * 3) for selector in LADDER]
    assert calibration.density < min(kept for share, kept in uniform if share >= 0.8)

    assert calibration.uniform_density is not None
    assert calibration.density < calibration.uniform_density < 1.0


@pytest.mark.parametrize("kl", [0.05, 0.02, 0.005])
def test_no_uniform_setting_that_reaches_the_kl_keeps_less(kl: float) -> None:
    calibration = found(kl=kl)
    reference = log_probs(create(Uneven))
    kept: list[float] = []
    for selector in LADDER:
        model = optimize(create(Uneven), selector, min_length=0)
        if compute_kl(reference, log_probs(model)) <= kl:
            kept.append(explain(model, X).density or 1.0)
    # A sparse layer's queries are not those of the dense model, which was measured.
    assert calibration.density <= min(kept, default=1.0) * 1.005
    if kept:
        assert calibration.uniform_density == pytest.approx(min(kept), rel=5e-3)


def test_a_tighter_target_costs_more() -> None:
    densities = [found(recall=recall).density for recall in (0.5, 0.7, 0.9, 0.99)]
    assert densities == sorted(set(densities))
    assert found(recall=1.0).reached == 1.0


def test_a_tighter_kl_costs_more_and_is_kept() -> None:
    reference = log_probs(create(Uneven))
    calibrations = [found(kl=kl) for kl in (0.05, 0.005)]
    for calibration in calibrations:
        model = optimize(create(Uneven), calibration, min_length=0)
        measured = compute_kl(reference, log_probs(model))
        assert calibration.reached == pytest.approx(measured, rel=1e-3, abs=1e-7)
        assert calibration.reached <= calibration.target
    assert calibrations[0].density < calibrations[1].density < 1.0


def log_probs(model: Any) -> Tensor:
    with torch.no_grad():
        return compute_log_probs(model(X)[0])


def test_a_kl_that_no_setting_reaches_leaves_all_dense(caplog: pytest.LogCaptureFixture) -> None:
    coarse = (replace(LADDER[0], top_p=0.1, threshold=1.0),)
    calibration = found(kl=1e-9, ladder=coarse)
    assert "dense: of the 1 setting tried, down to threshold 1, none that costs less" in caplog.text
    assert "reaches a kl of 1e-09; longer prompts or a larger kl" in caplog.text
    assert set(calibration.layers.values()) == {DENSE}
    assert (calibration.reached, calibration.density) == (0.0, 1.0)


@pytest.mark.parametrize("per_head", [False, True])
def test_the_coarsest_setting_that_is_tried_is_told(
    per_head: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="unisparse_flex")
    said = "calibrate found the coarsest setting that is tried"
    targets: list[dict[str, Any]] = [{"kl": 1e3}, {"recall": 1e-6}]
    for target in targets:
        caplog.clear()
        calibration = found(**target, per_head=per_head)
        assert said in caplog.text
        finer = found(**target, ladder=LADDER[1:], per_head=per_head)
        assert finer.density > calibration.density
    caplog.clear()
    found(recall=0.9, per_head=per_head)
    found(kl=1e-4, per_head=per_head)
    assert said not in caplog.text


def test_a_target_that_is_left_in_part_is_told_with_the_layers_that_nothing_cheaper_fits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="unisparse_flex")
    said = r"more than half of the target is left: this layer stays dense \((\d)\), every setting"
    # One setting drops much, and the other keeps all blocks.
    ladder = (LADDER[0], replace(LADDER[0], top_p=1.0, threshold=None))
    model = Unlike((40.0, 0.1, 0.1)).eval()
    calibration = calibrate(model, [X], kl=0.1, ladder=ladder, min_length=0)
    assert calibration.reached < 0.05
    names = [name for name, setting in calibration.layers.items() if setting == ladder[0]]
    assert names == ["layers.1", "layers.2"]
    found_said = re.search(said, caplog.text)
    assert found_said is not None
    assert found_said[1] == "0"
    # It is so: what costs less in that layer goes beyond the target.
    cheaper = replace(calibration, layers=dict.fromkeys(calibration.layers, ladder[0]))
    reference = model(X).log_softmax(-1)
    optimize(model, cheaper, min_length=0)
    assert compute_kl(reference, model(X).log_softmax(-1)) > 0.1
    restore(model)
    caplog.clear()
    # A target of which most is used, and one that all layers may have.
    for kl in (calibration.reached * 1.5, 1e3):
        assert calibrate(model, [X], kl=kl, ladder=ladder, min_length=0).sparse_layers
        assert "of the target is left" not in caplog.text


@pytest.mark.parametrize("weight", [None, 1e-9])
def test_of_a_layer_whose_cheaper_settings_may_fit_nothing_is_told(
    weight: float | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="unisparse_flex")

    def weigh(search: Search) -> dict[str, float] | None:
        return None if weight is None else dict.fromkeys(search.layers, weight)

    monkeypatch.setattr(Search, "_weigh", weigh)
    ladder = (LADDER[0], replace(LADDER[0], top_p=1.0, threshold=None))
    calibration = calibrate(Unlike((0.1, 40.0)).eval(), [X], kl=0.1, ladder=ladder, min_length=0)
    assert calibration.reached < 0.05
    assert calibration.layers == {"layers.0": ladder[0], "layers.1": DENSE}
    assert "of the target is left" not in caplog.text


def test_a_recall_that_is_left_in_part_is_told_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="unisparse_flex")
    ladder = (LADDER[0], replace(LADDER[0], top_p=1.0, threshold=None))
    model = Unlike((1.0, 1.0)).eval()
    model.layers.append(OfBlocksOf16())
    said = "half of the target is left: these layers stay dense (0-1), every setting that fits"
    for recall, is_told in ((0.9, True), (0.7, False)):
        caplog.clear()
        calibration = calibrate(model, [X], recall=recall, ladder=ladder, min_length=0)
        assert calibration.layers["layers.2"] == ladder[0]
        assert (1.0 - calibration.reached < (1.0 - recall) / 2) is is_told
        assert (DENSE in calibration.layers.values()) is is_told
        assert (said in caplog.text) is is_told


class OfBlocksOf16(nn.Module):
    """Attention to what is alike, in one block each."""

    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randn(1, 2, x.shape[1] // 16, 16, generator=generator)
        alike = 20 * F.normalize(codes, dim=-1).repeat_interleave(16, dim=2)
        return F.scaled_dot_product_attention(alike, alike, alike, is_causal=True)


class Unlike(nn.Module):
    """Layers whose outputs are added up: what is dropped means more in some than in others."""

    def __init__(self, scales: tuple[float, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(OfRandom(scale, i) for i, scale in enumerate(scales))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


class OfRandom(nn.Module):
    """Diffuse attention whose output is scaled: mass does not see by how much."""

    def __init__(self, scale: float, seed: int) -> None:
        super().__init__()
        self.scale, self.seed = scale, seed

    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        q, k, v = torch.randn(3, 1, 2, x.shape[1], 16, generator=generator)
        q = q + torch.tensor([1.0, -1.0])[:, None, None]
        return self.scale * F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_the_kl_of_each_layer_is_measured_and_not_its_mass_alone() -> None:
    model, kl = Unlike((0.1, 40.0, 0.1, 40.0)).eval(), 0.01
    passes: list[float] = []

    class Counting(Search):
        def _measure_kl(self, plan: Plan) -> float:
            passes.append(super()._measure_kl(plan))
            return passes[-1]

    class ByMass(Search):
        def _weigh(self) -> None:
            return None

    options: dict[str, Any] = {"min_length": 0, "per_head": False, "display": SILENT}
    by_kl, by_mass = (
        kind(model, [lambda: model(X)], LADDER, **options).reach_kl(kl)
        for kind in (Counting, ByMass)
    )
    assert by_kl.reached <= kl
    assert by_mass.reached <= kl
    assert by_kl.density < by_mass.density - 0.1
    # What is small costs little where it is read least.
    assert by_kl.layers["layers.0"] == by_kl.layers["layers.2"] == LADDER[0]
    assert len(passes) <= 3 * (KL_PASSES + 1) + len(model.layers)


def test_what_drops_next_to_nothing_is_no_result(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unisparse_flex.calibrating.search.NEARLY_ALL", 0.3)
    targets: list[dict[str, Any]] = [{"kl": 0.02}, {"recall": 0.9}]
    for target in targets:
        caplog.clear()
        calibration = found(**target)
        assert set(calibration.layers.values()) == {DENSE}
        assert calibration.density == 1.0
        assert calibration.reached == (0.0 if "kl" in target else 1.0)
        said = (
            r"every layer dense: nothing is gained, a \w+ of [\d.]+ keeps \d\d\.\d% of the blocks"
        )
        assert re.search(said, caplog.text)


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / "one.json", tmp_path / "other.json"]
    for path in paths:
        found(recall=0.8).save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert found(kl=0.02).to_json() == found(kl=0.02).to_json()


def test_the_model_is_left_as_it_came() -> None:
    model = create(Uneven)
    types = [type(module) for module in model.modules()]
    with torch.no_grad():
        before = model(X)
        found(model, kl=0.05)
        assert model(X).equal(before)
    assert [type(module) for module in model.modules()] == types
    assert not is_optimized(model)


class Words(nn.Module):
    """Logits in an object, as Hugging Face returns them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Transformer(layers=1)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> SimpleNamespace:
        return SimpleNamespace(logits=self.body(x) * scale)


def test_a_batch_is_a_tensor_a_tuple_or_a_mapping() -> None:
    batches = [X, (X,), {"x": X}]
    options: dict[str, Any] = {"kl": 0.05, "ladder": LADDER, "min_length": 0}
    texts = {calibrate(create(Words), [batch], **options).to_json() for batch in batches}
    assert len(texts) == 1
    with pytest.raises(TypeError, match=r"a batch must be .* got list"):
        calibrate(create(Words), [[X]], kl=0.05)
    with pytest.raises(TypeError, match=r"^x must be .* got a list.* return_tensors='pt'"):
        calibrate(create(Words), [{"x": X.tolist()}], kl=0.05)


def test_a_causal_mask_is_calibrated_as_causality_is() -> None:
    mask = torch.ones(400, 400, dtype=torch.bool).tril()
    options: dict[str, Any] = {"recall": 0.8, "ladder": LADDER, "min_length": 0}
    masked = calibrate(create(Attention), [{"x": X, "attn_mask": mask}], **options)
    assert masked.layers == calibrate(create(Attention), [X], **options).layers
    assert list(masked.layers) == ["Attention"]


def test_layers_that_are_predicted_to_be_slower_stay_dense() -> None:
    short = found(recall=0.5, min_length=None)
    assert set(short.layers.values()) == {DENSE}
    assert (short.reached, short.density) == (1.0, 1.0)
    fast = UniSparse(c_q=64, c_k=64, top_k=4)
    long = calibrate(create(Attention), [embeddings(4096)], recall=0.1, ladder=[fast])
    assert long.layers == {"Attention": fast}


def test_calls_that_cannot_be_sparse_are_dense_and_count_for_nothing() -> None:
    calibration = calibrate(create(), [X[:, :8]], recall=0.5, min_length=0)
    assert set(calibration.layers.values()) == {DENSE}
    assert (calibration.reached, calibration.density) == (1.0, 1.0)


def test_any_selector_may_stand_in_a_ladder_and_is_dense_where_it_is_not_defined() -> None:
    other = FlexPrefill(block_size=16, top_p=0.5)
    assert set(found(recall=0.1, ladder=[other]).layers.values()) <= {other, DENSE}
    mask = torch.ones(400, 400, dtype=torch.bool).tril()
    batch = {"x": X, "attn_mask": mask}
    options: dict[str, Any] = {"recall": 0.8, "min_length": 0}
    mixed = calibrate(create(Attention), [batch], ladder=(other, *LADDER), **options)
    assert mixed == calibrate(create(Attention), [batch], ladder=LADDER, **options)


def test_heads_of_their_own_keep_less_for_the_same_recall() -> None:
    layers, heads = found(recall=0.8), found(recall=0.8, per_head=True)
    assert heads.reached >= 0.8
    assert heads.density < layers.density
    reached, density = quality(list(heads.layers.values()))
    assert heads.reached == pytest.approx(reached, abs=1e-5)
    assert heads.density == pytest.approx(density, abs=1e-6)
    thresholds = [s.head_thresholds for s in heads.layers.values() if isinstance(s, UniSparse)]
    assert {len(t) for t in thresholds if t is not None} == {4}
    assert Calibration.from_json(heads.to_json()) == heads


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    calibration = found(recall=0.8)
    calibration.save(tmp_path / "found.json")
    assert Calibration.load(tmp_path / "found.json") == calibration
    assert Calibration.load(str(tmp_path / "found.json")) == calibration


def test_the_lengths_of_the_prompts_are_kept_and_not_asked_of_older_files() -> None:
    model = create(Uneven)
    prompts = [embeddings(300), X, embeddings(300)]
    calibration = calibrate(model, prompts, recall=0.8, ladder=LADDER, min_length=0)
    assert calibration.lengths == (300, X.shape[1])
    assert Calibration.from_json(calibration.to_json()) == calibration
    far = [calibration.is_far_beyond(n * X.shape[1] + 1) for n in (1, 2)]
    assert far == [False, True]
    assert not calibration.is_far_beyond(2 * X.shape[1])
    older = json.loads(calibration.to_json())
    del older["lengths"]
    read = Calibration.from_json(json.dumps(older))
    assert read == replace(calibration, lengths=())
    assert not read.is_far_beyond(10**6)


def test_a_path_optimizes_as_the_object_does_and_layers_differ(tmp_path: Path) -> None:
    calibration = with_layers(TWO)
    calibration.save(tmp_path / "found.json")
    selectors: list[Any] = [calibration, tmp_path / "found.json", str(tmp_path / "found.json")]
    outputs, densities = [], []
    for selector in selectors:
        model = optimize(create(), selector, min_length=0)
        with record_attention(model) as calls, torch.no_grad():
            outputs.append(model(X))
        densities.append([call.density for call in calls])
    assert outputs[0].equal(outputs[1])
    assert outputs[0].equal(outputs[2])
    assert densities[0] == densities[1] == densities[2]
    assert densities[0][0] != densities[0][1]


def test_each_layer_runs_as_it_would_with_its_setting_for_all() -> None:
    calls = explain(optimize(create(), with_layers(TWO), min_length=0), X).calls
    first = explain(optimize(create(), SELECTOR, min_length=0), X).calls[0]
    assert calls[0] == first
    swapped = with_layers({"layers.0.attention": FINE})
    calls = explain(optimize(create(), swapped, min_length=0), X).calls
    assert calls[0] == explain(optimize(create(), FINE, min_length=0), X).calls[0]


def test_what_is_dense_or_not_named_stays_dense() -> None:
    for layers in ({**TWO, "layers.0.attention": DENSE}, {"layers.1.attention": FINE}):
        calls = explain(optimize(create(), with_layers(layers), min_length=0), X).calls
        assert [call.decision for call in calls] == ["dense", "sparse"]
        assert [call.reason for call in calls] == [DenseReason.EXCLUDED, None]


def test_dense_layers_exclude_calibrated_ones_too() -> None:
    model = optimize(create(), with_layers(TWO), min_length=0, dense_layers=[-1])
    assert [call.decision for call in explain(model, X).calls] == ["sparse", "dense"]


def test_short_calls_stay_dense_in_a_calibrated_model() -> None:
    model = optimize(create(), with_layers(TWO), min_length=401)
    assert {call.reason for call in explain(model, X).calls} == {DenseReason.SHORT}


def test_a_graph_holds_the_settings_of_each_layer() -> None:
    model = optimize(create(), with_layers(TWO), min_length=0)
    configs = captured(model, X).configs()
    assert [[config.selector for config in graph] for graph in configs] == [[SELECTOR, FINE]]
    assert [[config.dense for config in graph] for graph in configs] == [[False, False]]


@pytest.mark.parametrize(
    ("layers", "backend"), [(TWO, "aot_eager"), ({"layers.1.attention": FINE}, "inductor")]
)
def test_a_compiled_calibrated_model_equals_the_eager_one(
    layers: dict[str, Setting], backend: str
) -> None:
    torch._dynamo.reset()
    model = optimize(create(), with_layers(layers), min_length=0)
    with torch.no_grad():
        eager = model(X)
        compiled = torch.compile(model, backend=backend, fullgraph=True)(X)
        dense = create()(X)
    assert rmse(compiled, eager) < 1e-5
    assert rmse(eager, dense) > 1e-3


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_a_layer_of_torchs_own_has_settings_too_until_the_next_optimize() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        model.layers[1].self_attn.in_proj_weight.mul_(8.0)
    options: dict[str, Any] = {"ladder": LADDER, "min_length": 0}
    calibration = calibrate(model, [X], recall=0.8, **options)
    assert list(calibration.layers) == ["layers.0.self_attn", "layers.1.self_attn"]
    chosen: dict[str, Setting] = {"layers.0.self_attn": DENSE, "layers.1.self_attn": LADDER[0]}
    optimize(model, replace(calibration, layers=chosen), min_length=0)
    assert [call.decision for call in explain(model, X).calls] == ["dense", "sparse"]
    optimize(model, SELECTOR, min_length=0)
    densities = [call.density for call in explain(model, X).calls]
    restore(model)
    optimize(model, SELECTOR, min_length=0)
    assert densities == [call.density for call in explain(model, X).calls]
    assert {type(module) for module in restore(model).modules()} & {nn.MultiheadAttention}


def test_a_name_that_is_no_module_is_refused_and_changes_nothing() -> None:
    model = create()
    with pytest.raises(ValueError, match=r"layers must name modules .* got 'layers.7.attention'"):
        optimize(model, with_layers({"layers.7.attention": FINE}))
    assert not is_optimized(model)


@pytest.mark.parametrize("of", [lambda m: m.layers, lambda m: m.layers[1], nn.Sequential])
def test_a_part_of_the_calibrated_model_or_what_is_around_it_is_told_so(of: Any) -> None:
    module = of(create())
    with pytest.raises(ValueError, match="give it the Transformer that was calibrated, not a part"):
        optimize(module, with_layers(TWO))


class WithHeads(Transformer):
    """A model that says how many heads it has."""

    def __init__(self, layers: int = 2, num_heads: int = 4) -> None:
        super().__init__(layers)
        for layer in self.layers:
            layer.attention.num_heads = num_heads  # type: ignore[union-attr]


class Renamed(WithHeads):
    """The same under another name."""


def test_a_calibration_of_the_model_itself_says_nothing() -> None:
    calibration = found(create(WithHeads), recall=0.9)
    assert calibration.sizes == {"layers": 2, "num_heads": 4}
    # Other weights, and a model that was optimized already.
    for model in (create(WithHeads), optimize(create(WithHeads, seed=1), SELECTOR)):
        assert is_optimized(optimize(model, calibration, min_length=0))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Renamed(), "one of WithHeads for Renamed, and the recall that"),
        (WithHeads(layers=3), r"WithHeads \(layers=2\) for WithHeads \(layers=3\); layers that it"),
        (WithHeads(num_heads=8), r"WithHeads \(num_heads=4\) for WithHeads \(num_heads=8\), and"),
        (
            Renamed(layers=3, num_heads=8),
            r"WithHeads \(layers=2, num_heads=4\) for Renamed \(layers=3, num_heads=8\);",
        ),
    ],
)
def test_a_calibration_of_another_model_names_both(model: Any, said: str, tmp_path: Path) -> None:
    found(create(WithHeads), recall=0.9).save(tmp_path / "calibration.json")
    with pytest.warns(UserWarning, match=f"selector must be the calibration .* {said}"):
        optimize(model, tmp_path / "calibration.json", min_length=0)
    assert is_optimized(model)
    with pytest.raises(ValueError, match=r"'layers.1.attention' of WithHeads, which Transformer"):
        optimize(create(layers=1), tmp_path / "calibration.json")


def test_models_of_a_library_say_their_heads_in_their_configuration() -> None:
    options = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 16, "head_dim": 8}

    def of_heads(heads: int, layers: int = 2) -> Any:
        config = transformers.LlamaConfig(
            **options | {"num_hidden_layers": layers},
            intermediate_size=32,
            num_attention_heads=heads,
            num_key_value_heads=2,
        )
        return transformers.LlamaForCausalLM(config).eval()

    calibration = calibrate(
        of_heads(4), [torch.arange(90)[None] % 16], recall=0.9, ladder=LADDER, min_length=0
    )
    assert is_optimized(optimize(of_heads(4), calibration))
    with pytest.warns(UserWarning, match="num_attention_heads=4.*num_attention_heads=8"):
        optimize(of_heads(8), calibration)
    with pytest.warns(UserWarning, match="layers=2.*layers=3"):
        optimize(of_heads(4, layers=3), calibration)


def changed(**changes: Any) -> Callable[[], str]:
    return lambda: json.dumps({**json.loads(with_layers(TWO).to_json()), **changes})


def without(key: str) -> str:
    values = json.loads(with_layers(TWO).to_json())
    del values[key]
    return json.dumps(values)


def layer(text: object) -> Callable[[], str]:
    return changed(layers={"layers.0.attention": text})


MALFORMED: list[tuple[Callable[[], str], str]] = [
    (lambda: "", "must be JSON"),
    (lambda: "[" * 100_000, "must be JSON"),
    (lambda: "[]", "must be a JSON object, got list"),
    (changed(extra=1), "got one with extra, which none has; write a new file"),
    (lambda: "{}", "must be a JSON object with layers, got an empty one; write a new file"),
    (
        lambda: json.dumps(dict.fromkeys("fedcba")),
        "a calibration must be a JSON object with layers, got one with a, b, c, d and 2 more; ",
    ),
    (lambda: without("reached"), "got one without reached; write a new file"),
    (lambda: '{"target": 1, "target": 2}', r"once, got \['target'\]"),
    (changed(target=float("nan")), "must be finite, got NaN"),
    (changed(target="0.9"), "target must be a finite number of at least 0, got '0.9'"),
    (changed(reached=10**380), "reached must be a finite number of at least 0, got 10000"),
    (changed(reached=10**400), "numbers must be finite, got one of 401 digits"),
    (changed(density=10**380), "density must be a finite number"),
    (changed(target=True), "target must be a finite number"),
    (changed(reached=-1), "reached must be a finite number of at least 0, got -1"),
    (changed(density=1.5), r"density must be a finite number in \[0, 1\], got 1.5"),
    (changed(quality="speed"), "quality must be one of .* got 'speed'"),
    (changed(quality=["kl"]), "quality must be one of"),
    (changed(model=3), "model must be a text, got 3"),
    (changed(torch=""), "torch must be a text"),
    (changed(sizes=[]), r"sizes must map names to integers, got \[\]"),
    (changed(sizes={"layers": 2.5}), r"sizes\['layers'\] must be an integer, got 2.5"),
    (changed(sizes={"": 2}), "a name in sizes must be a text"),
    (changed(lengths=7), "lengths must be integers above 0, each once, .* got 7"),
    (changed(lengths=[7, 7]), r"from small to large, got \[7, 7\]"),
    (changed(lengths=[0]), "lengths must be integers above 0, each once, .* got 0"),
    (changed(lengths=[7.0]), "lengths must be integers above 0, each once, .* got 7.0"),
    (changed(layers=[]), r"layers must be a JSON object, got \[\]"),
    (changed(layers={}), "layers must map at least one"),
    (changed(layers={"": "dense"}), "a name in layers must be a text"),
    (
        layer(None),
        r"layers\['layers.0.attention'\] must be a selector's text, a quality or 'dense', got None",
    ),
    (layer("sparse"), "must be a call with literals by name"),
    (layer("UniSparse("), "must be a call with literals by name"),
    (layer("UniSparse(128)"), "must be a call with literals by name"),
    (layer("UniSparse(**{'top_p': 0.9})"), "must be a call with literals by name"),
    (layer("UniSparse(top_p=0.9, top_p=0.8)"), "each once"),
    (layer("UniSparse(top_p=print('run'))"), "must be a call with literals by name"),
    (layer("UniSparse(top_p=" + "-" * 5000 + "1)"), "must be a call with literals by name"),
    (layer("UniSparse(top_k=" + "1" * 9000 + ")"), "at most 8192 characters, got 9017"),
    (layer("os.system('run')"), "must be a call with literals by name"),
    (layer("Unknown(top_p=0.9)"), "selector must be one of .* got 'Unknown'"),
    (layer("UniSparse(speed=2)"), "has no setting 'speed', got .*; it has block_size"),
    (layer("UniSparse(top_p=1.5)"), r"top_p must be in \(0, 1\], got 1.5"),
    (layer("UniSparse(top_p='0.9')"), "top_p must be a number"),
    (lambda: " " * (MAX_FILE_BYTES + 1), f"at most {MAX_FILE_BYTES} bytes"),
]


@pytest.mark.parametrize(("text", "message"), MALFORMED)
def test_a_malformed_file_is_refused(
    text: Callable[[], str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text())
    model = create()
    with pytest.raises(ValueError, match=f"bad.json: .*{message}"):
        optimize(model, path)
    assert not is_optimized(model)
    assert capsys.readouterr().out == ""


def test_a_file_that_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"bad.json: .*utf-8"):
        Calibration.load(path)
    with pytest.raises(FileNotFoundError):
        optimize(create(), tmp_path / "missing.json")


def with_compiled(name: str) -> Any:
    model = create()
    model.get_submodule(name).compile()
    return model


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "exactly one of recall and kl must be given"),
        ({"recall": 0.9, "kl": 0.1}, ValueError, "exactly one of recall and kl must be given"),
        ({"recall": 0.0}, ValueError, r"recall must be in \(0, 1\]"),
        ({"recall": "0.9"}, TypeError, "recall must be a number"),
        ({"kl": 0.0}, ValueError, "kl must be above 0"),
        ({"kl": float("nan")}, ValueError, "kl must be above 0"),
        ({"kl": None, "recall": True}, TypeError, "recall must be a number"),
        ({"kl": "0.1"}, TypeError, "kl must be a number"),
        ({"recall": 0.9, "ladder": []}, ValueError, "ladder must hold at least one"),
        ({"recall": 0.9, "ladder": [0.1]}, TypeError, "selector must be a selector"),
        ({"recall": 0.9, "ladder": [SELECTOR, FINE]}, ValueError, r"block sizes \[16, 32\]"),
        (
            {"recall": 0.9, "ladder": [FINE], "per_head": True},
            ValueError,
            "differ only in threshold",
        ),
        ({"recall": 0.9, "model": create().train()}, ValueError, "evaluation mode"),
        ({"recall": 0.9, "model": optimize(create())}, ValueError, "must not be optimized yet"),
        ({"recall": 0.9, "model": with_compiled("")}, ValueError, r"calibrate copy\.deepcopy"),
        ({"recall": 0.9, "model": with_compiled("layers.1")}, ValueError, "not be compiled yet"),
        ({"recall": 0.9, "model": torch.compile(create())}, ValueError, "the module that torch"),
        ({"recall": 0.9, "model": nn.Linear(64, 64).eval()}, ValueError, "must make attention"),
        ({"recall": 0.9, "model": None}, TypeError, r"model must be a torch.nn.Module"),
        ({"recall": 0.9, "batches": []}, ValueError, "batches must hold at least one"),
        ({"recall": 0.9, "batches": torch.ones(2, 4)}, TypeError, "batches must be an iterable"),
        ({"recall": 0.9, "batches": {"x": 1}}, TypeError, "batches must be an iterable"),
    ],
)
def test_bad_arguments_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {"model": create(), "batches": [X], **options}
    with pytest.raises(error, match=message):
        calibrate(options.pop("model"), options.pop("batches"), **options)


def test_an_output_without_logits_has_no_kl() -> None:
    class Tuple(Transformer):
        def forward(self, x: Tensor) -> Any:
            return (super().forward(x),)

    model = create(Tuple)
    with pytest.raises(TypeError, match=r"must return logits .* got tuple; give recall instead"):
        found(model, kl=0.1)
    assert not is_optimized(model)


def test_logits_that_are_not_numbers_have_no_kl() -> None:
    class Undefined(Transformer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.nan

    with pytest.raises(ValueError, match="must return finite logits, got NaN"):
        found(create(Undefined), kl=0.1)


def test_tokens_that_the_model_rules_out_weigh_nothing() -> None:
    class Ruled(Uneven):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return torch.cat([logits, torch.full_like(logits, -torch.inf)], dim=-1)

    plain = found(kl=0.02)
    ruled = found(create(Ruled), kl=0.02)
    assert ruled.layers == plain.layers
    assert ruled.reached == pytest.approx(plain.reached)


def test_slow_layers_of_heads_are_dense() -> None:
    short = found(recall=0.5, min_length=None, per_head=True)
    assert set(short.layers.values()) == {DENSE}
    fast = [UniSparse(c_q=64, c_k=64, threshold=t) for t in (1.0, 0.5)]
    long = calibrate(create(Attention), [embeddings(4096)], recall=0.1, ladder=fast, per_head=True)
    assert set(long.layers) == {"Attention"}
    assert isinstance(long.layers["Attention"], UniSparse)


class OfOneBlock(nn.Module):
    """Attention to what is alike."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def of_blocks(tokens: int) -> Tensor:
    """[1, 4, tokens, 64]: 128 tokens each are alike, and unlike all others."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(1, 4, -(-tokens // 128), 64, generator=generator)
    return 20 * F.normalize(codes, dim=-1).repeat_interleave(128, dim=2)[:, :, :tokens]


@pytest.mark.usefixtures("slow_kernels")
def test_what_optimize_leaves_dense_is_told_with_the_length_from_which_it_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def is_sparse(calibration: Calibration, tokens: int) -> bool:
        return bool(explain(optimize(OfOneBlock().eval(), calibration), of_blocks(tokens)).sparse)

    # It expects more than what it keeps here.
    ladder = [default_ladder()[9]]
    options: dict[str, Any] = {"recall": 0.9, "ladder": ladder}
    calibration = calibrate(OfOneBlock().eval(), [of_blocks(1024)], **options)
    assert calibration.sparse_layers
    assert not is_sparse(calibration, 1024)
    said = re.search(
        r"at 1024 tokens optimize leaves that layer \(OfOneBlock\) dense too; sparse from (\d+) on",
        caplog.text,
    )
    assert said is not None
    assert "or with min_length=0" in caplog.text
    start = int(said[1])
    assert not is_sparse(calibration, start - 128)
    assert is_sparse(calibration, start)
    caplog.clear()
    calibrate(OfOneBlock().eval(), [of_blocks(start)], **options)
    calibrate(OfOneBlock().eval(), [of_blocks(1024)], min_length=0, **options)
    assert caplog.text == ""


def test_nothing_is_shown_where_progress_is_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unisparse_flex.progress.QUIET_SECONDS", -1.0)
    found(recall=0.5)
    assert "layers.0.attention, batch 1 of 1" in capsys.readouterr().err
    found(recall=0.5, progress=False)
    assert capsys.readouterr().err == ""
