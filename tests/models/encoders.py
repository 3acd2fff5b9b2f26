"""Encoders, vision models, encoder-decoders and diffusion transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .family import HEADS, HIDDEN, PADDING_TOKEN, VOCABULARY, Family, smooth, token_ids

IMAGE, PATCH = 56, 4
VIDEO_FRAMES = 4
FRAMES = 200
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
}
TEXT: dict[str, Any] = {
    **SIZES,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": PADDING_TOKEN,
}
SEQUENCE_TO_SEQUENCE: dict[str, Any] = {
    "d_model": HIDDEN,
    "vocab_size": VOCABULARY,
    "pad_token_id": PADDING_TOKEN,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
LAYERS: dict[str, Any] = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", HEADS), ("ffn_dim", HIDDEN))
}

ENCODER_MODES = ("forward", "forward, right padding", "compiled forward")
IMAGE_MODES = ("forward", "compiled forward", "export")
SEQUENCE_MODES = (
    "forward",
    "compiled forward",
    "generate, DynamicCache",
    "generate, StaticCache",
    "beam search",
    "export",
)


def _build(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        settings = getattr(transformers, config)(**options)
        settings._attn_implementation = "sdpa"
        return getattr(transformers, name)(settings)

    return build


def _text() -> dict[str, Tensor]:
    return {"input_ids": token_ids()}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": smooth(1, 3, IMAGE, IMAGE)}


def _sequences() -> dict[str, Tensor]:
    return {"input_ids": token_ids(), "decoder_input_ids": token_ids(length=101, seed=1)}


def _audio() -> dict[str, Tensor]:
    return {
        "input_features": smooth(1, 2 * FRAMES, 8).transpose(1, 2).contiguous(),
        "decoder_input_ids": token_ids(length=101, seed=1),
    }


def _build_flux() -> nn.Module:
    import diffusers

    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        joint_attention_dim=HIDDEN,
        pooled_projection_dim=HIDDEN,
        axes_dims_rope=(4, 4, 8),
    )


def _flux_inputs() -> dict[str, Tensor]:
    side = 14
    rows = torch.arange(side * side)
    positions = torch.stack((torch.zeros_like(rows), rows // side, rows % side), dim=1)
    return {
        "hidden_states": smooth(1, side * side, 4),
        "encoder_hidden_states": smooth(1, 21, HIDDEN, seed=1),
        "pooled_projections": smooth(1, HIDDEN, seed=2),
        "timestep": torch.tensor([0.5]),
        "img_ids": positions.float(),
        "txt_ids": torch.zeros(21, 3),
    }


def _build_wan() -> nn.Module:
    import diffusers

    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=HIDDEN,
        freq_dim=HIDDEN,
        ffn_dim=HIDDEN,
        num_layers=2,
        rope_max_seq_len=32,
    )


def _wan_inputs() -> dict[str, Tensor]:
    return {
        "hidden_states": smooth(1, 4, VIDEO_FRAMES, 14, 14),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": smooth(1, 101, HIDDEN, seed=1),
    }


ENCODERS = (
    Family(
        name="BERT",
        build=_build("BertModel", "BertConfig", **TEXT),
        inputs=_text,
        modes=(*ENCODER_MODES, "compiled forward, right padding", "export"),
    ),
    Family(
        name="ModernBERT",
        build=_build(
            "ModernBertModel",
            "ModernBertConfig",
            **TEXT,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
            local_attention=64,
            layer_types=["full_attention", "sliding_attention"],
        ),
        inputs=_text,
        modes=(*ENCODER_MODES, "export"),
        note="one layer with a window of 64, one without",
    ),
    Family(
        name="ViT",
        build=_build("ViTModel", "ViTConfig", **SIZES, image_size=IMAGE, patch_size=PATCH),
        inputs=_image,
        modes=IMAGE_MODES,
    ),
    Family(
        name="SigLIP",
        build=_build(
            "SiglipVisionModel", "SiglipVisionConfig", **SIZES, image_size=IMAGE, patch_size=PATCH
        ),
        inputs=_image,
        modes=IMAGE_MODES,
        note="its pooling head is an nn.MultiheadAttention",
    ),
    Family(
        name="Whisper",
        build=_build(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **SEQUENCE_TO_SEQUENCE,
            **LAYERS,
            num_mel_bins=8,
            max_source_positions=FRAMES,
            max_target_positions=256,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        inputs=_audio,
        modes=SEQUENCE_MODES,
        note="encoder, decoder and cross attention",
    ),
    Family(
        name="T5",
        build=_build(
            "T5ForConditionalGeneration",
            "T5Config",
            **SEQUENCE_TO_SEQUENCE,
            d_kv=16,
            d_ff=HIDDEN,
            num_layers=2,
            num_heads=HEADS,
            dropout_rate=0.0,
        ),
        inputs=_sequences,
        modes=SEQUENCE_MODES,
        sharpness=1.0,
        note="a learned bias on the logits, as a float mask",
    ),
    Family(
        name="BART",
        build=_build(
            "BartForConditionalGeneration",
            "BartConfig",
            **SEQUENCE_TO_SEQUENCE,
            **LAYERS,
            max_position_embeddings=512,
        ),
        inputs=_sequences,
        modes=SEQUENCE_MODES,
        note="encoder, decoder and cross attention",
    ),
    Family(
        name="Flux",
        build=_build_flux,
        inputs=_flux_inputs,
        modes=IMAGE_MODES,
        note="diffusers; one joint text and image block, one single block",
    ),
    Family(
        name="Wan",
        build=_build_wan,
        inputs=_wan_inputs,
        modes=IMAGE_MODES,
        note="diffusers; self attention over a video of 196 patches, cross attention to 101 tokens "
        "of text; its norms compute in float32, in the oracle too",
    ),
)
