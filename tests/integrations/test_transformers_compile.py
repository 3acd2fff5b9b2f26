"""``attn_implementation="unisparse"`` under torch.compile and torch.export, and its own kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.api.reference import rmse
from tests.models.cells import Traced
from tests.models.families import BY_NAME
from tests.models.family import EVERYTHING, LENGTH, SELECTOR, token_ids
from tests.models.modes import forward, generate, padded_batch, prefill_in_chunks
from unisparse_flex import optimize
from unisparse_flex.passes.attend import marker
from unisparse_flex.passes.decision.refusals import flex_lowers

from .named import create, registered

FAMILIES = ("Llama", "Mistral", "Gemma 3")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def few() -> Iterator[str]:
    torch._dynamo.reset()
    with registered(SELECTOR) as name:
        yield name
    torch._dynamo.reset()


def batch_of(side: str) -> dict[str, Tensor]:
    return padded_batch(side) if side else {"input_ids": token_ids()}


@pytest.mark.parametrize("side", ["", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_with_the_masks_proved_attends_as_the_eager_model(
    few: str, family: str, side: str
) -> None:
    model, traced = create(family, few), Traced()
    compiled: Any = torch.compile(model, backend=traced, fullgraph=True)
    with torch.no_grad():
        output = forward(compiled, batch_of(side))
        assert rmse(output, forward(model, batch_of(side))) < 1e-6
    assert len(traced.graphs) == 1
    assert traced.decisions() == (2, {})
    assert not traced.reports[0].unproved
    assert not any("tensor" in mask for mask in traced.masks())


@pytest.mark.slow
def test_chunks_of_a_prompt_attend_compiled_as_eager_and_as_an_optimized_model(few: str) -> None:
    model = create("Gemma 3", few)
    compiled: Any = torch.compile(model, backend=Traced())
    optimized = optimize(BY_NAME["Gemma 3"].create(), SELECTOR, min_length=0)
    other: Any = torch.compile(optimized, backend=Traced())
    with torch.no_grad():
        eager = prefill_in_chunks(model, token_ids(), 64)
        assert rmse(prefill_in_chunks(compiled, token_ids(), 64), eager) < 1e-6
        assert rmse(prefill_in_chunks(other, token_ids(), 64), eager) < 1e-6


@pytest.mark.parametrize(
    ("cache", "padded"), [("dynamic", True), ("static", True), ("static", False)]
)
def test_a_compiled_forward_generates_what_sdpa_does(cache: str, padded: bool) -> None:
    """With a static cache masks are made outside of the graph, and computed where it takes them."""
    torch._dynamo.reset()
    ids = token_ids()
    inputs = padded_batch("left") if padded else {"input_ids": ids}
    inputs = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
    with registered(EVERYTHING) as name, torch.no_grad():
        model = create("Mistral", name)
        model.forward = torch.compile(model.forward, backend="aot_eager")
        output = generate(model, inputs, cache_implementation=cache)
        expected = generate(BY_NAME["Mistral"].create(), inputs, cache_implementation=cache)
    assert rmse(output, expected) < 1e-6
    assert output.argmax(-1).equal(expected.argmax(-1))
    torch._dynamo.reset()


@pytest.mark.slow
def test_inductor_computes_the_same(few: str) -> None:
    model = create("Llama", few)
    compiled: Any = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        output, expected = (forward(m, {"input_ids": token_ids()}) for m in (compiled, model))
        assert rmse(output, expected) < 1e-5


def test_an_exported_model_is_sparse(few: str) -> None:
    model = create("Llama", few)
    options = {"use_cache": False}
    program = torch.export.export(
        model, (), {"input_ids": token_ids(), **options}, strict=False
    ).module()
    traced = Traced()
    traced(program)
    assert traced.decisions() == (2, {})
    with torch.no_grad():
        output = forward(program, {"input_ids": token_ids()}, **options)
        assert rmse(output, forward(model, {"input_ids": token_ids()})) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kinds"), [("Mistral", 1), ("Gemma 3", 2)])
def test_an_eager_model_compiles_attention_once_for_all_layers_and_lengths(
    few: str, family: str, kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on CUDA, with the CPU's kernel. One graph for each kind of layer, then dynamic."""
    marker._compiled_sdpa.cache_clear()
    model = create(family, few)
    batches = [{"input_ids": token_ids(length=n)} for n in (LENGTH, LENGTH + 64, LENGTH + 101)]
    with torch.no_grad():
        expected = [forward(model, batch) for batch in batches]
        monkeypatch.setattr(
            marker,
            "_runs_compiled",
            lambda call: flex_lowers(call) and not getattr(marker._compiling, "active", False),
        )
        counters.clear()
        for batch, exact in zip(batches, expected, strict=True):
            assert rmse(forward(model, batch), exact) < 1e-5
    assert counters["stats"]["unique_graphs"] == 2 * kinds
    marker._compiled_sdpa.cache_clear()
