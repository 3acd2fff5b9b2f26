"""The attention function that `register` registers.

Symbols: B batch, Hq/Hkv heads, Sq/Skv tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..catching import config_in_force, is_seen_here, run_sparse
from ..passes import SparseConfig
from ..passes.attend import marked_sdpa
from ..passes.calls import SdpaCall
from ..passes.decision import refuse
from .deferred_mask import DeferredMask
from .first_prompt import attend_first, is_first_forward, settle
from .transformers_config import AttentionSettings, CallTexts, create_reader, stored_values
from .transformers_refusals import refuse_arguments, refuse_module

# Where the keys of a cache that decodes sparse say of which layer they are.
DECODE_LAYER = "unisparse_decode_layer"
# Stands for any mask beside causality.
SOME_MASK = "kv <= q"

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def create_attention_function(sdpa: Attention, settings: AttentionSettings) -> Attention:
    """An attention function for ``ALL_ATTENTION_FUNCTIONS``.

    Args:
        sdpa: transformers' own. It brings the call into the form of
            ``F.scaled_dot_product_attention``; that one becomes sparse, or stays dense.
        settings: Which blocks are kept, and where, as far as the model's configuration says
            nothing of it.
    """
    texts = CallTexts.of(settings)
    registered = texts.sparse, texts.dense, texts.dense_layers, texts.min_queries
    read_texts = create_reader(settings)

    def unisparse_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        refuse_module(module)
        refuse_arguments(module, options)
        stored = stored_values(module)
        sparse, dense, dense_layers, min_queries = (
            registered if stored is None else read_texts(stored)
        )
        outer = config_in_force()
        own = dense if dense_layers and _is_excluded(module, dense_layers) else sparse
        layer = getattr(key, DECODE_LAYER, None)
        if layer is not None and query.shape[-2] > 1:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            layer.observe(query, attention_mask, scale)
        if isinstance(attention_mask, DeferredMask):
            traced = torch.compiler.is_compiling()
            if not (traced or dropout or _adds_to_the_call(options)):
                text = own if outer is None else outer
                call = _proved_call(module, query, key, value, attention_mask, scaling, text)
                if call is not None:
                    if outer is None:
                        settle(sparse)
                    return marked_sdpa(call, text).transpose(1, 2).contiguous(), None
            attention_mask = attention_mask.compute()
        if layer is not None and query.shape[-2] == 1:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            found = layer.attend(query, attention_mask, scale)
            if found is not None:
                return found.transpose(1, 2).contiguous(), None
            key, value, attention_mask = layer.written(attention_mask)
        attend: Attention = partial(run_sparse, own, sdpa)
        few = not is_seen_here() and query.shape[-2] < min_queries
        if outer is not None or few:
            # Caught by who optimized the model; decoding, plain and 20 microseconds faster.
            attend = sdpa
        attend = partial(
            attend,
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            **options,
        )
        if outer is None and query.shape[-2] > 1 and is_first_forward(sparse):
            return attend_first(sparse, module, attend)
        return attend()

    return unisparse_attention


def _is_excluded(module: nn.Module, dense_layers: tuple[int, ...]) -> bool:
    index: Any = getattr(module, "layer_idx", None)
    if index is None:
        return False
    count = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    return index in dense_layers or (count is not None and index - count in dense_layers)


def _adds_to_the_call(options: dict[str, Any]) -> bool:
    """Whether transformers' function does more than call SDPA."""
    return options.get("position_bias") is not None or options.get("cache") is not None


def _proved_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: DeferredMask,
    scaling: float | None,
    text: str,
) -> SdpaCall | None:
    """The call with its mask as a formula, keys and values not repeated for their query heads.

    ``None`` where the mask is not proved, or the call would be dense.
    """
    groups: int = getattr(module, "num_key_value_groups", 1)
    if query.dim() != 4 or key.dim() != 4 or key.shape[1] * groups != query.shape[1]:
        return None
    call = SdpaCall(query=query, key=key, value=value, scale=scaling, enable_gqa=groups > 1)
    config = SparseConfig.decode(text)
    if not _some_mask_is_sparse(call, config):
        return None
    call = mask.bind(call)
    return call if call.attn_mask is None and refuse(call, config) is None else None


def _some_mask_is_sparse(call: SdpaCall, config: SparseConfig) -> bool:
    """Whether the call is sparse under some mask: asked first, proving one takes milliseconds."""
    return any(
        refuse(replace(call, is_causal=is_causal, mask=mask), config) is None
        for is_causal in (True, False)
        for mask in ("", SOME_MASK)
    )
