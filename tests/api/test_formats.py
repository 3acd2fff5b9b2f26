"""What an optimized model becomes: exported, packaged, saved, cached, compiled in a thread."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.api.models import SELECTOR, Attention, create, embeddings, split_heads
from tests.api.reference import assert_is_sparse
from unisparse_flex import optimize

X = embeddings(200)

COMPILE = """
import sys, torch
from torch._dynamo.utils import counters
from tests.api.models import Attention, create, embeddings
from unisparse_flex import UniSparse, optimize

selector = UniSparse(block_size=32, top_p=float(sys.argv[1]))
model = optimize(create(Attention), selector, min_length=0)
with torch.no_grad():
    torch.compile(model, fullgraph=True)(embeddings(200))
found = counters["inductor"]
print(found["fxgraph_cache_hit"], found["fxgraph_cache_miss"], found["fxgraph_cache_bypass"])
"""


# Strict export says so of every function mode that a forward enters.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_an_optimized_model_survives_export_saving_and_loading(
    strict: bool, tmp_path: Path
) -> None:
    model = create()
    optimized = optimize(copy.deepcopy(model), SELECTOR, min_length=0)
    with torch.no_grad():
        program = torch.export.export(optimized, (X,), strict=strict)
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2")
        assert_is_sparse(loaded.module()(X), model, SELECTOR, X)


@pytest.mark.slow
def test_an_exported_model_is_packaged_by_aot_inductor(tmp_path: Path) -> None:
    model = create(Attention)
    optimized = optimize(copy.deepcopy(model), SELECTOR, min_length=0)
    with torch.no_grad():
        program = torch.export.export(optimized, (X,))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        output = torch._inductor.aoti_load_package(path)(X)
    assert_is_sparse(output, model, SELECTOR, X)


@pytest.mark.slow
def test_a_second_process_hits_the_cache_and_other_settings_miss_it(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def counts(top_p: str) -> list[int]:
        ran = subprocess.run(
            [sys.executable, "-c", COMPILE, top_p],
            cwd=Path(__file__).parents[2],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return [int(count) for count in ran.stdout.split()]

    assert counts("0.5") == [0, 1, 0]
    assert counts("0.5") == [1, 0, 0]
    assert counts("0.7") == [0, 1, 0]


@pytest.mark.slow
def test_a_model_compiled_in_another_thread_is_sparse() -> None:
    torch._dynamo.reset()
    model = create(Attention)
    compiled = torch.compile(optimize(copy.deepcopy(model), SELECTOR, min_length=0), fullgraph=True)
    outputs: list[Tensor] = []

    def run() -> None:
        with torch.no_grad():
            outputs.append(compiled(X))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert_is_sparse(outputs[0], model, SELECTOR, X)


def test_saving_a_pretrained_model_writes_what_it_wrote_before(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
    model = LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, **sizes)
    )
    model.save_pretrained(tmp_path / "before")
    optimize(model).save_pretrained(tmp_path / "after")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "after").iterdir())
    for name in names:
        before, after = (tmp_path / folder / name for folder in ("before", "after"))
        assert before.read_bytes() == after.read_bytes()


class Flex(nn.Module):
    """A model that calls flex_attention itself."""

    def forward(self, x: Tensor) -> Tensor:
        heads = split_heads(x)
        mask = create_block_mask(
            lambda b, h, q, kv: q >= kv, None, None, x.shape[1], x.shape[1], device="cpu"
        )
        return flex_attention(heads, heads, heads, block_mask=mask)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_calls_of_flex_attention_are_left_alone(backend: str | None) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        exact = Flex()(X)
        model: Any = optimize(Flex(), SELECTOR, min_length=0)
        run = model if backend is None else torch.compile(model, backend=backend)
        torch.testing.assert_close(run(X), exact)
