"""The masks that Hugging Face's models build: proved, and computed by a compiled model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tests.api.reference import attend, rmse
from unisparse_flex import Selector, UniSparse, optimize
from unisparse_flex.block_masks import BlockGeometry
from unisparse_flex.block_masks.masks import MaskProgram
from unisparse_flex.integrations.transformers_names import cache_name
from unisparse_flex.passes import SparseConfig, rewrite_sdpa
from unisparse_flex.passes.attend.sparse_attention import keeps_window
from unisparse_flex.passes.rewrite.report import WINDOW_KEPT

from .lifting import Graph, assert_lifts, mask_of

LENGTH, WINDOW, VOCABULARY = 150, 40, 64
SELECTOR = UniSparse(block_size=16, c_q=4, c_k=4, top_k=3)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "attn_implementation": "sdpa",
}


def create(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "llama":
            model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
        elif name == "mistral":
            model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW))
        else:
            layers = ["sliding_attention", "full_attention"]
            config = Gemma3TextConfig(**SIZES, sliding_window=WINDOW, layer_types=layers)
            model = Gemma3ForCausalLM(config)
        # Trained models attend to some keys more than to others; these must too.
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.data *= 20
    return model.eval()


def token_ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def padding() -> Tensor:
    valid = torch.ones(2, LENGTH, dtype=torch.int64)
    valid[1, :30] = 0
    return valid


def positions() -> Tensor:
    return torch.cat([torch.arange(70), torch.arange(LENGTH - 70)])[None].expand(2, -1)


def plain(model: Any, run: Any) -> None:
    run(token_ids(), use_cache=False)


def padded(model: Any, run: Any) -> None:
    run(token_ids(), attention_mask=padding(), use_cache=False)


def packed(model: Any, run: Any) -> None:
    run(token_ids(), position_ids=positions(), use_cache=False)


def chunked(model: Any, run: Any) -> None:
    cache, ids = DynamicCache(config=model.config), token_ids()
    model(ids[:, :64], **{cache_name(): cache})
    run(ids[:, 64:], **{cache_name(): cache})


SLIDING = f"causal, sliding window {WINDOW}"
PACKED = "document, causal by position"
CASES: list[tuple[str, Callable[..., None], list[str]]] = [
    ("llama", plain, ["causal"] * 2),
    ("llama", padded, ["causal, key padding"] * 2),
    ("llama", packed, [PACKED] * 2),
    ("llama", chunked, ["causal"] * 2),
    ("mistral", plain, [SLIDING] * 2),
    ("mistral", chunked, [SLIDING] * 2),
    ("gemma3", plain, [SLIDING, "causal"]),
    ("gemma3", padded, [f"{SLIDING}, key padding", "causal, key padding"]),
    ("gemma3", packed, [PACKED] * 2),
]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(("name", "call", "kinds"), CASES)
def test_masks_of_a_model_are_proved(
    name: str, call: Callable[..., None], kinds: list[str], dynamic: bool | None
) -> None:
    model = optimize(create(name), SELECTOR, min_length=0)
    graph = Graph(model, dynamic=dynamic)
    with torch.no_grad():
        call(model, graph.run)
    for node in graph.calls:
        assert_lifts(graph, node)
    report = rewrite_sdpa(graph.modules[-1], SparseConfig(selector=SELECTOR))
    assert list(report.masks.values()) == kinds
    assert report.unproved == {}
    assert len(report.windows) == sum("sliding" in kind for kind in kinds)
    assert (WINDOW_KEPT in str(report)) is bool(report.windows)
    assert [mask_of(node) for node in graph.calls] == [None, None]
    if name == "llama" and (call is plain or (call is chunked and not dynamic)):
        # At a symbolic offset causality stays a formula.
        flags = [(node.args[5], node.kwargs["causal_lower_right"]) for node in graph.calls]
        assert flags == [(call is plain, call is chunked)] * len(flags)


class ByFormula(TorchFunctionMode):
    """Attention in the tensors' own dtype over the blocks that are selected under a formula."""

    def __init__(self, selector: Selector, text: str, tensors: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.selector, self.text, self.tensors = selector, text, tensors

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args
        mask = self.select(query, key, kwargs["scale"])
        return attend(query, key, value, attn_mask=mask, scale=kwargs["scale"], dtype=query.dtype)

    def select(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        if "t0" not in self.text:
            return self.select_by(self.text, (), query, key, scale)
        # Each row of the batch from its first real token on, as if it were alone.
        kept = query.new_zeros((*query.shape[:3], key.shape[2]), dtype=torch.bool)
        for row, start in enumerate(self.tensors[0].argmax(-1).tolist()):
            own = slice(row, row + 1), slice(None), slice(start, None)
            valid = (self.tensors[0][own[0], start:],)
            kept[*own, start:] = self.select_by(self.text, valid, query[own], key[own], scale)
        return kept

    def select_by(
        self, text: str, tensors: tuple[Tensor, ...], query: Tensor, key: Tensor, scale: float
    ) -> Tensor:
        q_len, kv_len = query.shape[2], key.shape[2]
        program = MaskProgram.parse(
            text, tensors=tensors, batch=query.shape[0], q_len=q_len, kv_len=kv_len
        )
        offset, rest = program.split_causal()
        size = self.selector.block_size
        geometry = BlockGeometry(
            q_len=q_len, kv_len=kv_len, block_size=size, causal_offset=offset, mask=rest
        )
        if keeps_window(geometry):
            return program.pairs(torch.arange(q_len), torch.arange(kv_len))
        options: dict[str, Any] = {"geometry": geometry, "scale": scale, "attn_mask": None}
        return self.selector.compute_selection(query, key, **options).token_mask()


def defined(model: Any, mode: Any, dtype: torch.dtype, **options: Any) -> Tensor:
    with torch.no_grad(), mode:
        return copy.deepcopy(model).to(dtype)(token_ids(), use_cache=False, **options).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("llama", "(kv <= q) & (~(t0[b, kv] == 0))", {"attention_mask": padding()}),
        ("mistral", f"(kv <= q) & (q < kv + {WINDOW})", {}),
    ],
    ids=["padded", "sliding"],
)
def test_a_compiled_model_computes_what_its_masks_and_blocks_say(
    name: str, text: str, options: dict[str, Any]
) -> None:
    model = create(name)
    mode = ByFormula(SELECTOR, text, (padding(),))
    exact = defined(model, mode, torch.float64, **options)
    same_precision = defined(model, mode, torch.float32, **options)
    torch._dynamo.reset()
    compiled: Any = torch.compile(
        optimize(copy.deepcopy(model), SELECTOR, min_length=0), fullgraph=True
    )
    with torch.no_grad():
        output = compiled(token_ids(), use_cache=False, **options).logits
        dense = copy.deepcopy(model).double()(token_ids(), use_cache=False, **options).logits
    real = padding().bool() if options else torch.ones(2, LENGTH, dtype=torch.bool)
    assert rmse(output[real], exact[real]) <= 3 * rmse(same_precision[real], exact[real])
    if name == "mistral":
        # A window of few blocks is kept whole.
        assert rmse(dense, exact) < 1e-12
    else:
        assert rmse(output[real], dense[real]) > 1e-2
