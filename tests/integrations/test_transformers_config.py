"""Settings in a model's configuration are saved with it and read by the registered name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.api.capture import captured
from tests.models.families import BY_NAME
from tests.models.family import SELECTOR, token_ids
from unisparse_flex import UniSparse, explain, optimize, restore, selectors
from unisparse_flex.integrations.transformers import configure, register
from unisparse_flex.passes import DenseReason

from .named import NAME, create, registered

pytestmark = pytest.mark.usefixtures("one_thread")

OTHER = UniSparse(block_size=16, top_k=2)


def load(path: Path, name: str = NAME) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation=name).eval()


def kept(model: Any) -> list[tuple[str, float | None]]:
    return [(call.decision, call.density) for call in explain(model, token_ids(length=203)).calls]


def selectors_of(model: Any) -> list[Any]:
    """Of the marked calls of one compiled forward."""
    (configs,) = captured(model, token_ids()).configs()
    return [config.selector for config in configs]


def test_settings_are_saved_and_read_back(tmp_path: Path) -> None:
    with registered(OTHER):
        model = create("Llama")
        configure(model.config, SELECTOR, min_length=0, dense_layers=[1])
        before = kept(model)
        model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["unisparse"] == {
        "selector": SELECTOR.text,
        "min_length": 0,
        "dense_layers": [1],
    }
    # Registered without settings: the file has them.
    with registered(OTHER):
        loaded = load(tmp_path)
        assert kept(loaded) == before
        assert [decision for decision, _ in before] == ["sparse", "dense"]
        del loaded.config.unisparse
        assert [decision for decision, _ in kept(loaded)] == ["sparse", "sparse"]
        assert kept(loaded)[0] != before[0]


@pytest.mark.parametrize("quality", ["fast", "balanced", "high", 2.0])
def test_a_quality_is_one_setting(tmp_path: Path, quality: Any) -> None:
    model = BY_NAME["Llama"].create()
    configure(model.config, quality=quality)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["unisparse"] == {"quality": quality}
    with registered(OTHER):
        assert selectors_of(load(tmp_path)) == [selectors.selector_of_quality(quality)] * 2


def test_what_the_configuration_leaves_out_is_as_registered(tmp_path: Path) -> None:
    model = BY_NAME["Llama"].create()
    configure(model.config, quality="high")
    model.save_pretrained(tmp_path)

    def decided(**registered_with: Any) -> list[tuple[str, DenseReason | None]]:
        with registered(OTHER, **registered_with):
            calls = explain(load(tmp_path), token_ids(length=203)).calls
        return [(call.decision, call.reason) for call in calls]

    assert decided(min_length=None) == [("dense", DenseReason.SLOWER)] * 2
    assert decided() == [("sparse", None)] * 2
    assert decided(dense_layers=[0]) == [("dense", DenseReason.EXCLUDED), ("sparse", None)]
    with registered(OTHER, dense_layers=[0]):
        loaded = load(tmp_path)
        assert selectors_of(loaded)[1] == selectors.selector_of_quality("high")
        loaded.config.unisparse["dense_layers"] = []
        assert [decision for decision, _ in kept(loaded)] == ["sparse", "sparse"]
        # Registered anew, for models that are there.
        register(NAME, OTHER, min_length=10_000)
        assert [decision for decision, _ in kept(loaded)] == ["dense", "dense"]


def test_a_selector_or_a_quality_of_a_configuration_replaces_either() -> None:
    with registered(None, quality="fast"):
        model = create("Llama")
        configure(model.config, SELECTOR)
        assert selectors_of(model) == [SELECTOR] * 2
        configure(model.config, dense_layers=[])
        assert model.config.unisparse == {"dense_layers": []}
        assert selectors_of(model) == [selectors.selector_of_quality("fast")] * 2


def test_a_saved_model_needs_the_name_and_the_name_needs_register(tmp_path: Path) -> None:
    """docs/faq.md quotes the message, which is transformers' own."""
    model = BY_NAME["Llama"].create()
    configure(model.config, SELECTOR, min_length=0)
    model.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {decision for decision, _ in kept(plain)} == {"dense"}
    message = 'Specified `attn_implementation="unisparse"` is not supported'
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    with registered(OTHER):
        assert {decision for decision, _ in kept(load(tmp_path))} == {"sparse"}


def test_compiled_models_follow_what_their_configuration_says() -> None:
    with registered(OTHER):
        model = create("Llama")
        assert selectors_of(model) == [OTHER] * 2
        configure(model.config, SELECTOR, min_length=0)
        assert selectors_of(model) == [SELECTOR] * 2
        compiled: Any = torch.compile(model, backend="eager")
        ids = token_ids(length=203)
        with torch.no_grad():
            sparse = compiled(ids).logits
            torch.testing.assert_close(sparse, model(ids).logits)
            # Compiled anew for other settings.
            configure(model.config, UniSparse(block_size=16, top_p=1.0), min_length=0)
            assert not torch.equal(compiled(ids).logits, sparse)


def test_what_optimize_gives_wins() -> None:
    with registered(OTHER):
        model = create("Llama")
        configure(model.config, OTHER, min_length=0)
        optimize(model, SELECTOR, min_length=0, dense_layers=(0,))
        assert [decision for decision, _ in kept(model)] == ["dense", "sparse"]
        assert selectors_of(model)[1] == SELECTOR


def test_one_model_of_a_name_does_not_change_another() -> None:
    with registered(SELECTOR):
        one, other = create("Llama"), create("Llama")
        configure(one.config, OTHER, min_length=0)
        assert selectors_of(one) == [OTHER] * 2
        assert selectors_of(other) == [SELECTOR] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("high", "config.unisparse must be a dict with keys of quality, selector"),
        ({"qualty": "high"}, "config.unisparse must be a dict with keys of quality, selector"),
        ({"quality": "best"}, "config.unisparse: quality must be one of 'fast', 'balanced'"),
        ({"selector": "import os"}, "a selector must be a call with literals by name"),
        ({"min_length": -1}, "config.unisparse: min_length must be at least 0, got -1"),
        ({"dense_layers": ["a"]}, "config.unisparse: dense_layers must hold integers, got 'a'"),
        ({"quality": torch.zeros(1)}, "config.unisparse must be a dict"),
        ({"quality": float("inf")}, "config.unisparse must be a dict"),
    ],
)
def test_what_is_no_setting_is_named_at_the_first_forward(values: Any, message: str) -> None:
    with registered(SELECTOR):
        model = create("Llama")
        model.config.unisparse = values
        with pytest.raises(ValueError, match=message):
            model(token_ids(length=203))


@pytest.mark.parametrize(
    ("text", "selector"), [("high", selectors.selector_of_quality("high")), (OTHER.text, OTHER)]
)
def test_names_and_configurations_take_a_selector_as_text(text: str, selector: Any) -> None:
    with registered(text):
        model = create("Llama")
        assert selectors_of(model) == [selector] * 2
    with registered(SELECTOR):
        model = create("Llama")
        configure(model.config, text, min_length=0)
        assert model.config.unisparse["selector"] == selector.text
        assert selectors_of(model) == [selector] * 2
    with pytest.raises(TypeError, match=r"file 'found.json'; .* give it to optimize"):
        configure(model.config, "found.json")


def test_configure_checks_what_it_keeps() -> None:
    model = BY_NAME["Llama"].create()
    with pytest.raises(TypeError, match=r"config must be .*, got LlamaForCausalLM; give such as"):
        configure(model, quality="high")
    with pytest.raises(ValueError, match="quality must be one of"):
        configure(model.config, quality="best")
    with pytest.raises(ValueError, match="must not both be given"):
        configure(model.config, SELECTOR, quality="high")
    with pytest.raises(TypeError, match="dense_layers must hold integers"):
        configure(model.config, dense_layers=[True])
    assert not hasattr(model.config, "unisparse")


def test_advice_names_what_is_saved_where_nothing_reads_it(tmp_path: Path) -> None:
    model = BY_NAME["Llama"].create()
    configure(model.config, quality="high", min_length=0)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, "sdpa")
    step = explain(loaded, token_ids(length=203)).next_step
    assert step == (
        "the configuration has settings, which only a registered name reads: load it after "
        "register() with attn_implementation='unisparse', or call "
        "optimize(model, quality='high', min_length=0); then explain it again"
    )
    optimize(loaded, quality="high", min_length=0)
    assert {decision for decision, _ in kept(loaded)} == {"sparse"}
    # Of what nobody saved, or nothing reads, nothing is said.
    del loaded.config.unisparse
    restore(loaded)
    assert "unisparse_flex.optimize(model)" in explain(loaded, token_ids(length=203)).next_step
    loaded.config.unisparse = "high"
    assert "unisparse_flex.optimize(model)" in explain(loaded, token_ids(length=203)).next_step


@pytest.mark.parametrize(
    ("name", "saved", "way_out"),
    [
        (NAME, {}, "register(quality='fast', min_length=0)"),
        ("other", {}, "register('other', quality='fast', min_length=0)"),
        (NAME, {"quality": "fast"}, "configure(model.config, quality='fast', min_length=0)"),
    ],
)
def test_advice_on_a_registered_name_is_what_changes_its_settings(
    name: str, saved: dict[str, Any], way_out: str
) -> None:
    with registered("fast", name=name, min_length=None):
        model = create("Llama", name)
        if saved:
            configure(model.config, **saved)
        step = explain(model, token_ids(length=203)).next_step
        assert f"{way_out} makes calls sparse all the same" in step
        # What is registered stays, what is saved would be replaced.
        setting = way_out if saved else way_out.replace("quality='fast', ", "")
        with pytest.raises(TypeError, match=re.escape(setting)):
            explain(model, token_ids(length=203), min_length=0)
        if not saved:
            eval(way_out, {"register": register})
        else:
            eval(way_out, {"configure": configure, "model": model})
        assert {decision for decision, _ in kept(model)} == {"sparse"}
        optimize(model)
        assert "optimize(model, min_length=0)" in explain(model, token_ids(length=203)).next_step


def test_advice_on_a_registered_name_writes_out_its_layers_and_its_selector() -> None:
    selector = UniSparse(top_p=0.85)
    with registered(selector, min_length=None, dense_layers=(1,)):
        model = create("Llama")
        step = explain(model, token_ids(length=203)).next_step
        way_out = f"register(selector={selector.text!r}, min_length=0, dense_layers=(1,))"
        assert f"{way_out} makes calls sparse" in step
        eval(way_out, {"register": register})
        assert [decision for decision, _ in kept(model)] == ["sparse", "dense"]


def test_advice_on_saved_settings_keeps_what_is_saved_and_no_more() -> None:
    with registered("fast", min_length=None):
        model = create("Llama")
        configure(model.config, quality="balanced", dense_layers=[1])
        step = explain(model, token_ids(length=203)).next_step
        way_out = "configure(model.config, quality='balanced', min_length=0, dense_layers=(1,))"
        assert f"{way_out} makes calls sparse" in step
        eval(way_out, {"configure": configure, "model": model})
        assert [decision for decision, _ in kept(model)] == ["sparse", "dense"]


@pytest.mark.parametrize("name", [NAME, "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_advice_on_a_padded_batch_names_padding(name: str, side: str) -> None:
    mask = torch.ones(2, 203, dtype=torch.int64)
    mask[0, slice(0, 40) if side == "left" else slice(-40, None)] = 0
    with registered(min_length=None):
        model = create("Llama", name)
        if name == "sdpa":
            optimize(model)
        found = explain(model, token_ids(length=203).expand(2, -1), attention_mask=mask)
    assert {call.reason for call in found.calls} == {DenseReason.NO_KERNEL}
    assert found.next_step == (
        "padding, or another mask that is a tensor, keeps calls dense: no sparse CPU kernel reads "
        "it; run prompts of one length, or leave it dense"
    )
