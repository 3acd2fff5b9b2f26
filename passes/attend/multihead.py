"""What `nn.MultiheadAttention` and the layers around it compute, their attention left open.

Symbols: L/S query and key tokens, N batch, E embedding, H heads, D head_dim.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calls import SdpaCall, own_function
from ..decision import DenseReason
from .marker import lowered_sdpa, marked_sdpa

Attend = Callable[[SdpaCall], Tensor]

MULTIHEAD = own_function(F.multi_head_attention_forward)
# What nn.TransformerEncoderLayer calls in inference, Dynamo's tracing included.
FUSED_ENCODER_LAYER = torch._transformer_encoder_layer_fwd
MULTIHEAD_TARGETS: dict[str, Callable[..., Any]] = {
    target.__name__: target for target in (MULTIHEAD, FUSED_ENCODER_LAYER)
}

# Plain values: they are read while Dynamo traces.
_PARAMETERS = inspect.signature(MULTIHEAD).parameters
_NAMES = tuple(_PARAMETERS)
_DEFAULTS = {
    name: parameter.default
    for name, parameter in _PARAMETERS.items()
    if parameter.default is not inspect.Parameter.empty
}
_KEYS_OF_ITS_OWN = ("bias_k", "bias_v", "static_k", "static_v")


def refuse_multihead(
    target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> DenseReason | None:
    """Why a call of a multi-head function is left to torch, whatever its lengths.

    Args:
        target: One of ``MULTIHEAD_TARGETS``.
        args: Its positional arguments; tensors, or what stands for them in a graph.
        kwargs: Its keyword arguments.

    Returns:
        The reason; ``None`` where `marked_multihead` can compute it.
    """
    if target is FUSED_ENCODER_LAYER:
        return None
    call = bind_multihead(args, kwargs)
    if call["need_weights"]:
        return DenseReason.NEEDS_WEIGHTS
    if call["training"] and call["dropout_p"] > 0.0:
        return DenseReason.DROPOUT
    if call["add_zero_attn"] or any(call[name] is not None for name in _KEYS_OF_ITS_OWN):
        return DenseReason.KEYS_OF_ITS_OWN
    return None


def marked_multihead(name: str, *args: Any, config: str, **kwargs: Any) -> Any:
    """A function of ``MULTIHEAD_TARGETS``, by name, whose attention is the marker operator."""
    return _compute(name, args, kwargs, lambda call: marked_sdpa(call, config))


def lowered_multihead(name: str, *args: Any, config: str, body: str = "", **kwargs: Any) -> Any:
    """`marked_multihead`, lowered as `lowered_sdpa` is: traced for Inductor only."""

    def attend(call: SdpaCall) -> Tensor:
        return lowered_sdpa(*call.positional(), **call.keywords(), config=config, body=body)

    return _compute(name, args, kwargs, attend)


def bind_multihead(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``F.multi_head_attention_forward`` by name, defaults filled in."""
    return {**_DEFAULTS, **dict(zip(_NAMES, args, strict=False)), **kwargs}


def _compute(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], attend: Attend) -> Any:
    if name == FUSED_ENCODER_LAYER.__name__:
        return _encoder_layer(*args, **kwargs, attend=attend)
    return _multihead(bind_multihead(args, kwargs), attend), None


def _multihead(call: Mapping[str, Any], attend: Attend) -> Tensor:
    """`F.multi_head_attention_forward` without weights: [L, N, E] or [L, E]."""
    query = call["query"]
    if query.dim() == 2:
        padding = call["key_padding_mask"]
        batched = {name: call[name].unsqueeze(1) for name in ("query", "key", "value")}
        batched["key_padding_mask"] = None if padding is None else padding.unsqueeze(0)
        return _multihead({**call, **batched}, attend).squeeze(1)
    if call["is_causal"] and call["attn_mask"] is None:
        raise RuntimeError(
            "attn_mask must be given with the is_causal hint, got None; make it with "
            "nn.Transformer.generate_square_subsequent_mask"
        )
    causal = call["is_causal"] and call["key_padding_mask"] is None
    mask, padding = (None, None) if causal else (call["attn_mask"], call["key_padding_mask"])
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (query.shape[1], call["num_heads"]))
    if padding is not None:
        padding = padding[:, None, None, :]
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    weight = [call[n] for n in names] if call["use_separate_proj_weight"] else None
    projected = _project(
        (query, call["key"], call["value"]),
        call["in_proj_weight"] if weight is None else weight,
        call["in_proj_bias"],
    )
    heads = [t.unflatten(-1, (call["num_heads"], -1)).permute(1, 2, 0, 3) for t in projected]
    output = attend(
        SdpaCall(
            query=heads[0],
            key=heads[1],
            value=heads[2],
            attn_mask=_combine_masks(mask, padding, query.dtype),
            is_causal=causal,
        )
    )
    output = output.permute(2, 0, 1, 3).flatten(2)
    return F.linear(output, call["out_proj_weight"], call["out_proj_bias"])


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
    *,
    attend: Attend,
) -> Tensor:
    """`torch._transformer_encoder_layer_fwd`, argument for argument: [N, L, E]."""
    if mask is not None and mask_type == 1:
        mask = mask[:, None, None, :]
    mask = _combine_masks(mask, None, src.dtype)

    def attention(x: Tensor) -> Tensor:
        projected = F.linear(x, qkv_weight, qkv_bias).chunk(3, dim=-1)
        query, key, value = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in projected)
        output = attend(SdpaCall(query=query, key=key, value=value, attn_mask=mask))
        return F.linear(output.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = F.gelu(hidden) if use_gelu else F.relu(hidden)
        return F.linear(hidden, ffn_weight_2, ffn_bias_2)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    if norm_first:
        src = src + attention(norm(src, norm_weight_1, norm_bias_1))
        return src + feed_forward(norm(src, norm_weight_2, norm_bias_2))
    src = norm(src + attention(src), norm_weight_1, norm_bias_1)
    return norm(src + feed_forward(src), norm_weight_2, norm_bias_2)


def _project(
    inputs: tuple[Tensor, Tensor, Tensor],
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | None,
) -> Sequence[Tensor]:
    """Queries, keys and values after the input projection, packed or one weight for each."""
    query, key, value = inputs
    if isinstance(weight, Tensor):
        if query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, dim=-1)
        weight = weight.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [F.linear(x, w, b) for x, w, b in zip(inputs, weight, biases, strict=True)]


def _combine_masks(
    mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one of SDPA's: bool (True takes part) where both are bool, else additive.

    In a module's own bool masks True hides a key.
    """
    given = [m for m in (mask, padding) if m is not None]
    if not given:
        return None
    if all(m.dtype is torch.bool for m in given):
        hidden = given[0] if len(given) == 1 else given[0] | given[1]
        return ~hidden
    added = [_additive(m, dtype) for m in given]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
