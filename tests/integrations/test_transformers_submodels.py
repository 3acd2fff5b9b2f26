"""Dictionaries of implementations: a model of text and images, each part with its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.api.reference import rmse
from tests.models.family import EVERYTHING, SELECTOR, VOCABULARY, set_weights, smooth, token_ids
from unisparse_flex.reports import record_attention

from .named import NAME, registered

IMAGE_TOKEN, IMAGE_TOKENS, WINDOW = VOCABULARY - 1, 16, 64
LAYER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

pytestmark = pytest.mark.usefixtures("one_thread")


def create(implementation: Any) -> Any:
    """Gemma 3 with images: a SigLIP tower, and text whose image tokens see each other."""
    text = {
        **LAYER,
        "vocab_size": VOCABULARY,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**LAYER, "image_size": 32, "patch_size": 4},
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=IMAGE_TOKEN,
        image_token_id=IMAGE_TOKEN,
        attn_implementation=implementation,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.Gemma3ForConditionalGeneration(config).eval()
    set_weights(model, 2.0)
    return model.requires_grad_(False)


def inputs() -> dict[str, Tensor]:
    """Two prompts with an image each, the second padded on the left."""
    ids = token_ids(2) % (VOCABULARY - 2) + 1
    ids[:, 70 : 70 + IMAGE_TOKENS] = IMAGE_TOKEN
    mask = torch.ones_like(ids)
    mask[1, :33] = 0
    return {
        "input_ids": ids.masked_fill(mask == 0, 0),
        "attention_mask": mask,
        "token_type_ids": (ids == IMAGE_TOKEN).long(),
        "pixel_values": smooth(2, 3, 32, 32),
    }


def logits(model: Any) -> Tensor:
    given = inputs()
    return model(**given).logits[given["attention_mask"].bool()]


@torch.no_grad()
def decisions(model: Any) -> dict[str, set[str]]:
    """Of the calls of the image tower and of the text model."""
    found: dict[str, set[str]] = {"vision": set(), "text": set()}
    with record_attention(model) as calls:
        logits(model)
    for call in calls:
        if "head" not in call.layer:
            found["vision" if "vision" in call.layer else "text"].add(call.decision)
    return found


@pytest.mark.parametrize(
    ("implementation", "sparse"),
    [
        (NAME, {"vision", "text"}),
        ({"text_config": NAME, "vision_config": "sdpa"}, {"text"}),
        ({"text_config": "sdpa", "vision_config": NAME}, {"vision"}),
        ({"text_config": NAME, "vision_config": "eager"}, {"text"}),
    ],
)
@pytest.mark.parametrize("when", ["made", "set"])
def test_each_part_has_its_own_implementation(
    when: str, implementation: Any, sparse: set[str]
) -> None:
    with registered(SELECTOR):
        if when == "made":
            model = create(implementation)
        else:
            model = create("sdpa")
            model.set_attn_implementation(implementation)
        found = decisions(model)
    assert {part for part, seen in found.items() if seen == {"sparse"}} == sparse
    assert all("sparse" not in seen for part, seen in found.items() if part not in sparse)


@pytest.mark.parametrize("implementation", [NAME, {"text_config": NAME, "vision_config": "sdpa"}])
@torch.no_grad()
def test_with_every_block_kept_it_computes_what_sdpa_does(implementation: Any) -> None:
    """Also for the masks of image tokens, which see each other both ways."""
    with registered(EVERYTHING):
        output = logits(create(implementation))
    assert rmse(output, logits(create("sdpa"))) < 1e-6


@torch.no_grad()
def test_parts_have_settings_of_their_own_under_two_names() -> None:
    with registered(SELECTOR), registered(EVERYTHING, name="everything"):
        model = create({"text_config": "everything", "vision_config": NAME})
        with record_attention(model) as calls:
            logits(model)
    dense = {call.layer: call.density for call in calls if call.decision == "sparse"}
    assert all((density == 1.0) == ("vision" not in layer) for layer, density in dense.items())
    assert len(dense) == 4
