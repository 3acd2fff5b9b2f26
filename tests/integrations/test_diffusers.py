"""diffusers: its native backends call SDPA by keyword, in pipelines and compiled models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from torch import Tensor, nn

from tests.api.models import qkv
from tests.api.reference import attend, rmse
from tests.models.cells import Traced, in_float64
from tests.models.families import BY_NAME
from tests.models.family import EVERYTHING, HIDDEN, SELECTOR, set_weights, smooth
from tests.models.replay import recorded, replayed
from unisparse_flex import explain, is_optimized, temporarily_optimize
from unisparse_flex.passes import DenseReason
from unisparse_flex.reports import record_attention

STEPS, SIDE, TEXT = 2, 14, 21
# Each transformer's attention calls: blocks of Flux, SD3; self and cross attention of Wan.
CALLS = {"Flux": 2, "Wan": 4, "SD3": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


def create_sd3() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = diffusers.SD3Transformer2DModel(
            sample_size=SIDE,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            caption_projection_dim=HIDDEN,
            joint_attention_dim=HIDDEN,
            pooled_projection_dim=HIDDEN,
            pos_embed_max_size=SIDE,
        ).eval()
    set_weights(model, 2.0)
    return model.requires_grad_(False)


def create(name: str) -> Any:
    return create_sd3() if name == "SD3" else BY_NAME[name].create()


def inputs(name: str) -> dict[str, Tensor]:
    if name != "SD3":
        return BY_NAME[name].inputs()
    return {
        "hidden_states": smooth(1, 4, SIDE, SIDE),
        "encoder_hidden_states": smooth(1, TEXT, HIDDEN, seed=1),
        "pooled_projections": smooth(1, HIDDEN, seed=2),
        "timestep": torch.tensor([500]),
    }


@torch.no_grad()
def run(model: Any, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(name).items()}
    return model(**given, return_dict=False)[0]


@pytest.fixture
def reset() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
def test_a_transformer_is_sparse_inside_the_block_and_dense_behind(name: str) -> None:
    model, dense = create(name), run(create(name), name)
    with temporarily_optimize(model, SELECTOR, min_length=0):
        calls = explain(model, **inputs(name)).calls
        output = run(model, name)
    assert [call.decision for call in calls] == ["sparse"] * CALLS[name]
    assert any(call.density is not None and call.density < 1.0 for call in calls)
    assert rmse(output, dense) > 1e-3
    assert run(model, name).equal(dense)


@pytest.mark.parametrize("name", CALLS)
def test_a_transformer_attends_to_the_selected_blocks_alone(name: str) -> None:
    model, untouched = create(name), create(name)
    with temporarily_optimize(model, SELECTOR, min_length=0):
        output, calls = recorded(lambda: run(model, name))
    double = in_float64(untouched)
    exact = replayed(lambda: run(double, name, torch.float64), calls, SELECTOR)
    plain = replayed(lambda: run(untouched, name), calls, SELECTOR)
    assert rmse(output, exact) <= 3 * rmse(plain, exact)


@pytest.mark.parametrize("name", CALLS)
def test_with_every_block_kept_a_transformer_computes_the_same(name: str) -> None:
    model = create(name)
    with temporarily_optimize(model, EVERYTHING, min_length=0):
        output = run(model, name)
    assert rmse(output, run(create(name), name)) < 1e-6


@pytest.mark.usefixtures("reset")
@pytest.mark.parametrize("name", CALLS)
def test_the_pass_rewrites_every_call_of_a_compiled_transformer(name: str) -> None:
    model, traced = create(name), Traced()
    with temporarily_optimize(model, SELECTOR, min_length=0):
        eager = run(model, name)
        compiled: Any = torch.compile(model, backend=traced, fullgraph=True)
        assert rmse(run(compiled, name), eager) < 1e-6
    assert len(traced.graphs) == 1
    assert traced.decisions() == (CALLS[name], {})


@pytest.mark.usefixtures("reset")
@pytest.mark.slow
def test_inductor_computes_what_the_eager_transformer_does() -> None:
    model, dense = create("Flux"), run(create("Flux"), "Flux")
    with temporarily_optimize(model, SELECTOR, min_length=0):
        eager = run(model, "Flux")
        compiled: Any = torch.compile(model, fullgraph=True)
        assert rmse(run(compiled, "Flux"), eager) < 1e-5
    assert rmse(run(compiled, "Flux"), dense) < 1e-5
    assert rmse(eager, dense) > 1e-3


def create_pipeline() -> Any:
    """Flux without text encoders: prompts are given as embeddings, latents are returned."""
    pipeline: Any = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=BY_NAME["Flux"].create(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline: Any) -> Tensor:
    """[1, SIDE * SIDE, 4] after all steps."""
    output = pipeline(
        prompt_embeds=smooth(1, TEXT, HIDDEN, seed=1),
        pooled_prompt_embeds=smooth(1, HIDDEN, seed=2),
        height=16 * SIDE,
        width=16 * SIDE,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    return output.images


def test_a_pipeline_is_sparse_at_every_step() -> None:
    pipeline = create_pipeline()
    dense = latents(pipeline)
    with temporarily_optimize(pipeline.transformer, SELECTOR, min_length=0):
        with record_attention(pipeline.transformer) as calls:
            output = latents(pipeline)
        assert latents(pipeline).equal(output)
    assert [call.decision for call in calls] == ["sparse"] * 2 * STEPS
    assert output.shape == dense.shape
    assert rmse(output, dense) > 1e-3
    assert not is_optimized(pipeline.transformer)
    assert latents(pipeline).equal(dense)
    with temporarily_optimize(pipeline.transformer, EVERYTHING, min_length=0):
        assert rmse(latents(pipeline), dense) < 1e-5


def test_a_pipeline_is_no_module_and_refused_with_the_way_out() -> None:
    with pytest.raises(TypeError, match=r"FluxPipeline.*pipe\.transformer"):
        temporarily_optimize(create_pipeline()).__enter__()


class Dispatched(nn.Module):
    """One call of diffusers' dispatcher, tokens before heads."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        return dispatch_attention_fn(query, key, value).transpose(1, 2)


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_backends_that_call_sdpa_are_sparse(backend: str) -> None:
    query, key, value = qkv(200, heads=(4, 4))
    model = Dispatched()
    with attention_backend(backend), temporarily_optimize(model, SELECTOR, min_length=0):
        calls = explain(model, query, key, value).calls
        output = model(query, key, value)
    assert [call.decision for call in calls] == ["sparse"]
    exact = attend(query, key, value, selector=SELECTOR)
    plain = attend(query, key, value, selector=SELECTOR, dtype=torch.float32)
    assert rmse(output, exact) <= 3 * rmse(plain, exact)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_backend_with_kernels_of_its_own_stays_as_it_is() -> None:
    query, key, value = qkv(200, heads=(4, 4))
    model = Dispatched()
    with attention_backend("flex"):
        dense = model(query, key, value)
        with temporarily_optimize(model, SELECTOR, min_length=0):
            assert explain(model, query, key, value).calls == ()
            assert model(query, key, value).equal(dense)


def test_a_transformer_that_is_not_optimized_says_so() -> None:
    calls = explain(create("Flux"), **inputs("Flux")).calls
    assert [call.reason for call in calls] == [DenseReason.NOT_OPTIMIZED] * CALLS["Flux"]
