"""`attention` and `optimize` refuse what they cannot do, and name the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.attention.bias import causal_lower_right

from unisparse_flex import UniSparse, attention, is_optimized, optimize

from .models import Attention, create, embeddings

FEW = UniSparse(block_size=16, top_k=2)


def tokens(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape or (2, 4, 40, 8), **options)


BOTH = {"attn_mask": tokens(40, 40).bool(), "is_causal": True}
EMPTY_KEYS = {"key": tokens(2, 4, 0, 8), "value": tokens(2, 4, 0, 8)}

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, TypeError, r"query must be a torch\.Tensor, got list"),
    ({"value": None}, TypeError, r"value must be a torch\.Tensor, got NoneType"),
    ({"query": tokens(4, 40, 8)}, ValueError, "query must be .*got 3 dimensions"),
    ({"key": tokens(1, 2, 4, 40, 8)}, ValueError, "key must be .*got 5 dimensions"),
    ({"value": tokens(40, 8)}, ValueError, "value must be .*got 2 dimensions"),
    ({"query": tokens(2, 6, 40, 8), "enable_gqa": True}, ValueError, "query heads must be a mult"),
    (
        {"query": tokens(2, 8, 40, 8)},
        ValueError,
        "query and key must have the same number of heads unless enable_gqa=True, got 8 and 4",
    ),
    ({"value": tokens(2, 2, 40, 8)}, ValueError, "value must have key's heads"),
    ({"value": tokens(2, 4, 41, 8)}, ValueError, "value must have key's heads and tokens"),
    ({"key": tokens(3, 4, 40, 8)}, ValueError, "key must have query's batch size 2, got 3"),
    ({"key": tokens(2, 4, 40, 4)}, ValueError, "key must have query's head_dim 8, got 4"),
    ({"query": tokens(2, 4, 0, 8)}, ValueError, "query must hold at least one token"),
    (EMPTY_KEYS, ValueError, "key must hold at least one token"),
    ({"key": tokens(device="meta")}, ValueError, "key must be on query's device cpu, got meta"),
    ({"value": tokens(device="meta")}, ValueError, "value must be on key's device cpu"),
    ({"query": tokens(dtype=torch.int64)}, TypeError, "query must be float16.*int64"),
    ({"key": tokens(dtype=torch.float64)}, TypeError, "key must have query's dtype"),
    ({"value": tokens(dtype=torch.bfloat16)}, TypeError, "value must have key's dtype"),
    ({"dropout_p": 0.1}, NotImplementedError, r"dropout_p must be 0\.0 .*got 0\.1"),
    (BOTH, ValueError, "attn_mask and is_causal must not both be given"),
    (
        {"attn_mask": BOTH["attn_mask"], "causal_lower_right": True},
        ValueError,
        "attn_mask and causal_lower_right must not both be given, got both; put causality into",
    ),
    (
        {"is_causal": True, "causal_lower_right": True},
        ValueError,
        "is_causal and causal_lower_right must not both be given, got both; keep is_causal where",
    ),
    ({"causal_lower_right": 1}, TypeError, "causal_lower_right must be True or False, got 1 of"),
    (
        {"query": tokens(2, 4, 41, 8), "causal_lower_right": True},
        NotImplementedError,
        "causal_lower_right with more queries than keys",
    ),
    ({"attn_mask": [[True]]}, TypeError, r"attn_mask must be a torch\.Tensor, got list"),
    ({"attn_mask": tokens(40, 40).long()}, TypeError, "attn_mask must be bool"),
    ({"attn_mask": tokens(40, 39)}, ValueError, "attn_mask must broadcast"),
    ({"attn_mask": tokens(3, 1, 1, 40)}, ValueError, "attn_mask must broadcast"),
    ({"attn_mask": tokens(1, 2, 4, 40, 40)}, ValueError, "attn_mask must broadcast"),
    ({"attn_mask": tokens(40, device="meta")}, ValueError, "attn_mask must be on query's device"),
    ({"attn_mask": causal_lower_right(30, 40)}, ValueError, "attn_mask"),
    ({"attn_mask": causal_lower_right(40, 40), "is_causal": True}, ValueError, "attn_mask"),
    ({"selector": 0.95}, TypeError, "selector must be a selector"),
    ({"selector": UniSparse}, TypeError, r"got the class UniSparse; give UniSparse\(\)"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"query": tokens(), "key": tokens(), "value": tokens(), "selector": FEW}
    with pytest.raises(error, match=message):
        attention(**{**arguments, **changes})


def test_a_mask_that_needs_a_gradient_is_refused_by_its_name() -> None:
    mask = tokens(40, 40, requires_grad=True)
    with pytest.raises(NotImplementedError, match="attn_mask needs a gradient"):
        attention(tokens(), tokens(), tokens(), attn_mask=mask, selector=FEW)


def test_lower_right_with_more_queries_than_keys_is_refused() -> None:
    query = tokens(2, 4, 41, 8)
    with pytest.warns(UserWarning, match="seq_len_q > seq_len_kv"):
        bias = causal_lower_right(41, 40)
    with pytest.raises(NotImplementedError, match="more queries than keys"):
        attention(query, tokens(), tokens(), attn_mask=bias, selector=FEW)


def test_what_is_refused_eagerly_is_refused_by_its_name_when_compiled() -> None:
    run = torch.compile(
        lambda query: attention(query, tokens(), tokens(), selector=FEW),
        backend="eager",
        fullgraph=True,
    )
    with pytest.raises(Exception, match="query must hold at least one token"):
        run(tokens(2, 4, 0, 8))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: create().forward, TypeError, "model must be a torch.nn.Module, got method"),
        (lambda: None, TypeError, "model must be a torch.nn.Module, got NoneType"),
        (lambda: Attention, TypeError, r"got the class Attention; give Attention\(\.\.\.\)"),
        (lambda: fx.symbolic_trace(nn.Linear(2, 2)), TypeError, "model must be a module in Python"),
        (
            lambda: torch.export.export(create(), (embeddings(200),)),
            TypeError,
            "model must be .*got ExportedProgram; .*rewrite_sdpa",
        ),
    ],
)
def test_what_cannot_be_optimized_is_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        optimize(make())


# torch.jit is deprecated, from torch 2.14 on as a FutureWarning.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_a_scripted_module_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a module in Python, got the graph"):
        optimize(torch.jit.script(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"selector": 0.95}, TypeError, "selector must be a selector"),
        ({"selector": UniSparse}, TypeError, r"got the class UniSparse; give UniSparse\(\)"),
        ({"min_length": -1}, ValueError, "min_length must be at least 0, got -1"),
        ({"min_length": "long"}, TypeError, "min_length must be an int"),
        ({"dense_layers": (2,)}, ValueError, r"dense_layers .*\(0 to 1\), got 2"),
        ({"dense_layers": (-3,)}, ValueError, r"dense_layers .*got -3"),
        ({"dense_layers": ("layers.0",)}, ValueError, r"dense_layers .*got 'layers.0'"),
    ],
)
def test_bad_options_are_named_and_leave_the_model_as_it_is(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = create()
    with pytest.raises(error, match=message):
        optimize(model, **options)
    assert not is_optimized(model)


def test_a_model_without_layers_has_none_to_exclude() -> None:
    with pytest.raises(ValueError, match="dense_layers"):
        optimize(create(Attention), dense_layers=(0,))
