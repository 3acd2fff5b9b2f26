"""`register` and `unregister`: names, settings, versions, and what they refuse."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from tests.api.capture import captured
from tests.api.reference import rmse
from tests.models.families import BY_NAME
from tests.models.family import EVERYTHING, SELECTOR, token_ids
from tests.models.modes import padded_batch
from unisparse_flex import UniSparse, calibrate, explain, optimize, restore
from unisparse_flex.integrations import first_prompt
from unisparse_flex.integrations.transformers import register, unregister
from unisparse_flex.passes import DenseReason

from .named import create, registered

pytestmark = pytest.mark.usefixtures("one_thread")


def decisions(model: Any, length: int = 203) -> list[tuple[str, DenseReason | None]]:
    return [(c.decision, c.reason) for c in explain(model, token_ids(length=length)).calls]


def selectors(model: Any) -> list[Any]:
    """Of the marked calls of one compiled forward."""
    (configs,) = captured(model, token_ids()).configs()
    return [config.selector for config in configs]


def test_a_model_is_made_with_the_name_and_can_be_set_to_it() -> None:
    with registered():
        config: Any = copy.deepcopy(BY_NAME["Llama"].create().config)
        config._attn_implementation = "unisparse"
        made = transformers.LlamaForCausalLM(config).eval()
        assert made.config._attn_implementation == "unisparse"
        later = BY_NAME["Llama"].create()
        assert {d for d, _ in decisions(later)} == {"dense"}
        later.set_attn_implementation("unisparse")
        assert decisions(made) == decisions(later) == [("sparse", None)] * 2
        later.set_attn_implementation("sdpa")
        assert {d for d, _ in decisions(later)} == {"dense"}


def test_the_name_is_an_argument_of_from_pretrained_and_from_config(tmp_path: Any) -> None:
    BY_NAME["Llama"].create().save_pretrained(tmp_path)
    with registered():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation="unisparse"
        )
        assert decisions(model) == [("sparse", None)] * 2
        # The name stays with the process, not with the weights.
        model.save_pretrained(tmp_path)
        assert "unisparse" not in (tmp_path / "config.json").read_text()
        other = transformers.AutoModelForCausalLM.from_config(
            model.config, attn_implementation="unisparse"
        )
        assert other.config._attn_implementation == "unisparse"


def test_registering_twice_with_the_same_settings_changes_nothing() -> None:
    with registered(SELECTOR) as name:
        functions = AttentionInterface._global_mapping[name]
        masks = AttentionMaskInterface._global_mapping[name]
        register(name, SELECTOR, min_length=0)
        assert AttentionInterface._global_mapping[name] is functions
        assert AttentionMaskInterface._global_mapping[name] is masks


def test_registering_again_replaces_the_settings_of_models_that_have_the_name() -> None:
    with registered(SELECTOR) as name:
        model = create("Llama", name)
        assert selectors(model) == [SELECTOR] * 2
        register(name, EVERYTHING, min_length=0)
        assert selectors(model) == [EVERYTHING] * 2
        assert [call.density for call in explain(model, token_ids()).calls] == [1.0] * 2


def around(function: Any) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Around:
    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


WRAPPERS = [around, Around, functools.partial, lambda f: functools.wraps(f)(around(around(f)))]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_what_somebody_wraps_around_the_functions_stays_and_goes_with_them(wrap: Any) -> None:
    mappings: Any = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    with registered(SELECTOR) as name:
        for mapping in mappings:
            mapping[name] = wrap(mapping[name])
        wrapped = [mapping[name] for mapping in mappings]
        register(name, SELECTOR, min_length=0)
        assert [mapping[name] for mapping in mappings] == wrapped
        assert decisions(create("Llama", name)) == [("sparse", None)] * 2
        register(name, EVERYTHING, min_length=0)
        assert [c.density for c in explain(create("Llama", name), token_ids()).calls] == [1.0] * 2
    assert not any(name in mapping for mapping in mappings)


def test_somebody_elses_function_of_the_name_is_left_to_them() -> None:
    mapping: Any = AttentionInterface._global_mapping
    with registered(SELECTOR) as name:
        foreign = mapping[name] = around(print)
        with pytest.raises(ValueError, match="registered by somebody else"):
            register(name, SELECTOR, min_length=0)
    assert mapping.pop(name) is foreign


def test_a_compiled_model_follows_the_settings() -> None:
    torch._dynamo.reset()
    with registered(SELECTOR) as name, torch.no_grad():
        model = create("Llama", name)
        compiled: Any = torch.compile(model, backend="aot_eager")
        few = compiled(token_ids()).logits
        register(name, EVERYTHING, min_length=0)
        everything = compiled(token_ids()).logits
        dense = BY_NAME["Llama"].create()(token_ids()).logits
    assert (few - dense).abs().max() > 1e-2
    torch.testing.assert_close(everything, dense)


def test_names_have_settings_of_their_own() -> None:
    with registered(SELECTOR, name="coarse"), registered(EVERYTHING, name="fine"):
        assert selectors(create("Llama", "coarse")) == [SELECTOR] * 2
        assert selectors(create("Llama", "fine")) == [EVERYTHING] * 2


def test_layers_by_number_stay_dense() -> None:
    excluded, sparse = ("dense", DenseReason.EXCLUDED), ("sparse", None)
    for layers, expected in (((0,), [excluded, sparse]), ([-1], [sparse, excluded])):
        with registered(dense_layers=layers) as name:
            assert decisions(create("Mistral", name)) == expected
            assert decisions(create("Llama", name)) == expected
            assert len(selectors(create("Llama", name))) == 2


def test_by_default_short_prompts_stay_dense() -> None:
    with registered(min_length=None) as name:
        assert {d for d, _ in decisions(create("Llama", name))} == {"dense"}
    with registered(min_length=204) as name:
        assert decisions(create("Llama", name)) == [("dense", DenseReason.SHORT)] * 2


MISFITS: dict[str, Callable[[int], Tensor]] = {
    "of one prompt": lambda length: torch.ones(1, length).long().index_fill(1, torch.arange(3), 0),
    "of too many dimensions": lambda length: torch.ones(2, length, length).long().tril(),
    "of one dimension": lambda length: (torch.arange(length) > 3).long(),
    "of pairs of three prompts": lambda length: torch.ones(3, 1, length, length).bool().tril(),
}


@pytest.mark.parametrize("settings", [{}, {"min_length": None}])
@pytest.mark.parametrize("length", [40, 203])
@pytest.mark.parametrize("name", MISFITS)
def test_a_mask_that_does_not_fit_the_prompts_is_the_error_that_sdpa_raises(
    name: str, length: int, settings: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    ids, mask = token_ids(batch=2, length=length), MISFITS[name](length)
    with pytest.raises((IndexError, RuntimeError)) as expected:
        create("Llama", "sdpa")(ids, attention_mask=mask)
    with registered(EVERYTHING, **settings) as implementation:
        model = create("Llama", implementation)
        with pytest.raises(type(expected.value)) as raised:
            model(ids, attention_mask=mask)
    assert str(raised.value) == str(expected.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("side", ["", "left"])
def test_a_models_own_settings_win_over_those_of_its_name(side: str) -> None:
    """So `temporarily_optimize`, `calibrate` and `optimize` mean the same for every model."""
    batch = padded_batch(side) if side else {"input_ids": token_ids()}
    with registered(EVERYTHING) as name:
        model = create("Llama", name)
        optimize(model, SELECTOR, min_length=0, dense_layers=(1,))
        calls = explain(model, **batch).calls
        assert [(c.decision, c.reason) for c in calls] == [
            ("sparse", None),
            ("dense", DenseReason.EXCLUDED),
        ]
        assert calls[0].density is not None
        assert calls[0].density < 1.0
        (configs,) = captured(lambda: model(**batch)).configs()
        assert [(c.selector, c.dense) for c in configs] == [(SELECTOR, False), (SELECTOR, True)]
        with torch.no_grad():
            output = model(**batch).logits
            plain = optimize(BY_NAME["Llama"].create(), SELECTOR, min_length=0, dense_layers=(1,))
            assert output.equal(plain(**batch).logits)
            with pytest.warns(UserWarning, match="which stays sparse"):
                restore(model)
            assert [call.density for call in explain(model, **batch).calls] == [1.0] * 2


def test_a_named_model_is_calibrated_as_the_plain_one() -> None:
    settings: dict[str, Any] = {"recall": 0.9, "ladder": [SELECTOR, EVERYTHING], "progress": False}
    expected = calibrate(BY_NAME["Llama"].create(), [token_ids()], **settings)
    with registered(SELECTOR) as name:
        assert calibrate(create("Llama", name), [token_ids()], **settings) == expected


def test_an_unregistered_name_is_unknown() -> None:
    with registered() as name:
        model = create("Llama", name)
        model(token_ids())
    with pytest.raises(KeyError, match=name):
        model(token_ids())
    with pytest.raises(ValueError, match="not supported"):
        create("Llama", name)
    assert name not in AttentionMaskInterface._global_mapping
    unregister(name)
    unregister("never_registered")


@pytest.mark.parametrize(
    "name", ["sdpa", "eager", "flash_attention_2", "flex_attention", "my_sdpa", "org/kernel", "", 3]
)
def test_names_that_transformers_reads_otherwise_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="name must be letters"):
        register(name)
    assert "sdpa" in AttentionInterface._global_mapping


@pytest.mark.parametrize("interface", [AttentionInterface, AttentionMaskInterface])
def test_a_name_that_somebody_else_registered_is_refused(
    interface: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(interface._global_mapping, "theirs", print)
    with pytest.raises(ValueError, match="'theirs', which ALL_"):
        register("theirs")
    assert interface._global_mapping["theirs"] is print
    with registered() as name:
        interface._global_mapping[name] = print
        with pytest.raises(ValueError, match="choose another"):
            register(name, EVERYTHING)
        unregister(name)
        assert interface._global_mapping.pop(name) is print


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"selector": "UniSparse"}, ValueError, "a selector must be a call with literals"),
        ({"selector": UniSparse}, TypeError, "selector must be"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"min_length": -1}, ValueError, "min_length must be"),
        ({"dense_layers": ("0",)}, TypeError, "dense_layers must hold integers, got '0'"),
    ],
)
def test_bad_settings_are_refused_and_register_nothing(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        register(**settings)
    assert "unisparse" not in AttentionInterface._global_mapping


def test_a_calibration_is_refused_as_it_names_modules() -> None:
    found = calibrate(
        BY_NAME["Llama"].create(), [token_ids()], recall=0.9, ladder=[SELECTOR], progress=False
    )
    with pytest.raises(TypeError, match="selector must be"):
        register(selector=found)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["4.57.6", "5.3.0"])
def test_versions_that_are_too_old_are_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(ImportError, match=rf"transformers 5\.4 or newer, got {version}"):
        register()


def test_a_missing_transformers_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"unisparse-flex\[transformers\]"):
        register()


def test_models_with_attention_sinks_are_refused() -> None:
    with registered() as name:
        model = BY_NAME["gpt-oss"].create()
        model.set_attn_implementation(name)
        with pytest.raises(NotImplementedError, match=r"GptOssAttention.*eager"):
            model(token_ids())


def test_models_with_a_soft_cap_are_refused() -> None:
    config: Any = transformers.Gemma2Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        attn_implementation="eager",
    )
    with registered() as name:
        model: Any = transformers.Gemma2ForCausalLM(config).eval()
        model.set_attn_implementation(name)
        with pytest.raises(NotImplementedError, match=r"Gemma2Attention.*eager"):
            model(token_ids())


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "indices"])
def test_an_argument_that_sdpa_would_ignore_is_refused(argument: str) -> None:
    with registered() as name:
        attend = AttentionInterface._global_mapping[name]
        module, query = torch.nn.Module(), torch.randn(1, 2, 40, 16)
        attend(module, query, query, query, None, is_causal=True, **{argument: None})
        with pytest.raises(NotImplementedError, match=f"{argument} must be None"):
            attend(module, query, query, query, None, is_causal=True, **{argument: 1.0})


def test_models_that_ask_for_the_name_sdpa_are_refused() -> None:
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextAttention

    module = Gemma4TextAttention.__new__(Gemma4TextAttention)
    with registered() as name:
        query = torch.randn(1, 2, 40, 16)
        with pytest.raises(NotImplementedError, match=r"unisparse_flex\.optimize"):
            AttentionInterface._global_mapping[name](module, query, query, query, None)


def test_scale_dropout_and_grouped_heads_reach_attention() -> None:
    """In training mode, with dropout, the call is dense and drops what sdpa's does."""
    config: Any = copy.deepcopy(BY_NAME["Llama"].create().config)
    config.attention_dropout = 0.3
    dense: Any = transformers.LlamaForCausalLM(config).train()
    with registered(UniSparse(block_size=16, top_p=0.3)) as name:
        model = copy.deepcopy(dense)
        model.set_attn_implementation(name)
        outputs = []
        for each in (model, dense):
            torch.manual_seed(3)
            outputs.append(each(token_ids()).logits)
        assert outputs[0].equal(outputs[1])


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("side", ["", "left"])
def test_training_gives_the_gradients_of_sdpa(side: str, checkpointing: bool | None) -> None:
    """With and without activation checkpointing, reentrant or not."""
    batch = padded_batch(side) if side else {"input_ids": token_ids()}
    real = batch["attention_mask"].bool() if side else slice(None)

    def gradients(implementation: str) -> list[torch.Tensor]:
        model = create("Gemma 3", implementation).requires_grad_(True).train()
        if checkpointing is not None:
            model.activation_checkpointing_enable({"use_reentrant": checkpointing})
        model(**batch).logits[real].square().mean().backward()
        return [parameter.grad for parameter in model.parameters()]

    with registered(EVERYTHING) as name:
        for ours, theirs in zip(gradients(name), gradients("sdpa"), strict=True):
            assert rmse(ours, theirs) < 1e-5


def test_a_registered_model_without_a_sparse_call_is_told_why_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, kind in (("_settled", set), ("_outcomes", dict), ("_told_short", set)):
        monkeypatch.setattr(first_prompt, name, kind())

    def said(length: int) -> list[str]:
        caplog.clear()
        with torch.no_grad():
            for _ in range(2):
                model(token_ids(length=length))
        texts = [" ".join(record.getMessage().split()) for record in caplog.records]
        return [text for text in texts if text.startswith("nothing of a Llama model is sparse")]

    with registered(UniSparse(), min_length=None):
        model = create("Llama")
        for length, reason in ((9, DenseReason.FEW_QUERIES), (203, DenseReason.SLOWER)):
            (text,) = said(length)
            assert "all 2 calls of its attention stayed dense" in text
            assert reason in text
        assert not said(9)
    with registered(SELECTOR, dense_layers=[0]):
        model = create("Llama")
        assert not said(203)
        assert not said(9)
