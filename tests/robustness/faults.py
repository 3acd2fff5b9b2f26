"""What can be wrong with a call: how it becomes so, and the error that says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case

Change = Callable[[dict[str, Any], Case], None]
NOT_CAUSAL = {"is_causal": False, "causal_lower_right": False}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One way to be wrong.

    Attributes:
        change: Makes the arguments of a right call wrong.
        error: What is raised.
        message: Pattern of what it says.
        everywhere: Whether a selector alone minds too, which sees no value and no dropout.
        in_sdpa: Whether SDPA may be asked the same without reading what it must not.
    """

    change: Change
    error: type[Exception]
    message: str
    everywhere: bool = True
    in_sdpa: bool = True


def _set(**changes: Any) -> Change:
    return lambda arguments, case: arguments.update(changes)


def _each(name: str, of: Callable[[Tensor], Any]) -> Change:
    return lambda arguments, case: arguments.update({name: of(arguments[name])})


def _other_float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64 if tensor.dtype is not torch.float64 else torch.float32)


def _longer(tensor: Tensor) -> Tensor:
    return torch.cat((tensor, tensor[:, :, :1]), 2)


def _one_head_more(tensor: Tensor) -> Tensor:
    return torch.cat((tensor, tensor[:, :1]), 1)


def _indivisible(arguments: dict[str, Any], case: Case) -> None:
    arguments["key"] = arguments["query"].new_zeros(
        case.batch, case.q_heads + 1, case.kv_len, case.head_dim
    )
    arguments["value"] = arguments["query"].new_zeros(
        case.batch, case.q_heads + 1, case.kv_len, case.value_dim
    )
    arguments["enable_gqa"] = True


def _heads_without_gqa(arguments: dict[str, Any], case: Case) -> None:
    arguments["query"] = torch.cat((arguments["query"],) * 2, 1)
    arguments.update(enable_gqa=False, attn_mask=None)


def _mask_of_wrong_shape(arguments: dict[str, Any], case: Case) -> None:
    mask = torch.ones(case.q_len + 2, case.kv_len + 2, dtype=torch.bool)
    arguments.update(attn_mask=mask, **NOT_CAUSAL)


def _mask(of: Callable[[int, int], Any]) -> Change:
    return lambda arguments, case: arguments.update(
        attn_mask=of(case.q_len, case.kv_len), **NOT_CAUSAL
    )


def _mask_and(flag: str) -> Change:
    def change(arguments: dict[str, Any], case: Case) -> None:
        mask = torch.ones(case.q_len, case.kv_len, dtype=torch.bool)
        arguments.update({"attn_mask": mask, **NOT_CAUSAL, flag: True})

    return change


FAULTS: dict[str, Fault] = {
    "query of integers": Fault(
        change=_each("query", lambda t: torch.zeros(t.shape, dtype=torch.int64)),
        error=TypeError,
        message=r"query must be float16, .* got torch\.int64; convert",
    ),
    "all of integers": Fault(
        change=lambda arguments, case: arguments.update(
            {n: torch.zeros(arguments[n].shape, dtype=torch.int32) for n in ("query", "key")}
        ),
        error=TypeError,
        message=r"query must be float16, .* got torch\.int32",
    ),
    "key of another dtype": Fault(
        change=_each("key", _other_float),
        error=TypeError,
        message=r"key must have query's dtype torch\.\w+, got torch\.\w+; convert",
    ),
    "value of another dtype": Fault(
        change=_each("value", _other_float),
        error=TypeError,
        message=r"value must have key's dtype torch\.\w+, got torch\.\w+; convert",
        everywhere=False,
    ),
    "query on meta": Fault(
        change=_each("query", lambda t: t.to("meta")),
        error=ValueError,
        message="key must be on query's device meta, got cpu; move",
        in_sdpa=False,
    ),
    "value on meta": Fault(
        change=_each("value", lambda t: t.to("meta")),
        error=ValueError,
        message="value must be on key's device cpu, got meta; move",
        everywhere=False,
        in_sdpa=False,
    ),
    "mask on meta": Fault(
        change=_mask(lambda q, k: torch.ones(q, k, dtype=torch.bool, device="meta")),
        error=ValueError,
        message="attn_mask must be on query's device cpu, got meta; move",
        in_sdpa=False,
    ),
    "query of three dimensions": Fault(
        change=lambda arguments, case: arguments.update(query=arguments["query"].flatten(0, 1)),
        error=ValueError,
        message=r"query must be \[batch, heads, .* got 3 dimensions .*unsqueeze",
    ),
    "key is no tensor": Fault(
        change=_set(key=[[1.0]]), error=TypeError, message=r"key must be a torch\.Tensor, got list"
    ),
    "query is sparse": Fault(
        change=_each("query", lambda t: torch.zeros(t.shape).to_sparse()),
        error=TypeError,
        message=r"query must be a dense tensor, got layout torch\.sparse_coo; convert",
    ),
    "key of another batch": Fault(
        change=lambda arguments, case: arguments.update(
            key=arguments["key"].new_zeros(
                case.batch + 1, case.kv_heads, case.kv_len, case.head_dim
            )
        ),
        error=ValueError,
        message=r"key must have query's batch size \d, got \d",
        in_sdpa=False,
    ),
    "key of another head_dim": Fault(
        change=lambda arguments, case: arguments.update(
            key=arguments["key"].new_zeros(
                case.batch, case.kv_heads, case.kv_len, case.head_dim + 1
            )
        ),
        error=ValueError,
        message=r"key must have query's head_dim \d+, got \d+",
    ),
    "value longer than key": Fault(
        change=_each("value", _longer),
        error=ValueError,
        message="value must have key's heads and tokens, got",
        everywhere=False,
        in_sdpa=False,
    ),
    "value of more heads": Fault(
        change=_each("value", _one_head_more),
        error=ValueError,
        message="value must have key's heads and tokens, got",
        everywhere=False,
        in_sdpa=False,
    ),
    "no query": Fault(
        change=_each("query", lambda t: t[:, :, :0]),
        error=ValueError,
        message="query must hold at least one token, got shape",
        in_sdpa=False,
    ),
    "no keys": Fault(
        change=_each("key", lambda t: t[:, :, :0]),
        error=ValueError,
        message="key must hold at least one token, got shape",
        in_sdpa=False,
    ),
    "no heads": Fault(
        change=_each("query", lambda t: t[:, :0]),
        error=ValueError,
        message="query heads must be a multiple of key heads, both positive, got 0",
        in_sdpa=False,
    ),
    "no head_dim": Fault(
        change=_each("query", lambda t: t[..., :0]),
        error=ValueError,
        message="query must have a head_dim of at least 1, got shape",
        in_sdpa=False,
    ),
    "heads that do not divide": Fault(
        change=_indivisible,
        error=ValueError,
        message=r"query heads must be a multiple of key heads, .* got \d+ and \d+",
        in_sdpa=False,
    ),
    "groups without enable_gqa": Fault(
        change=_heads_without_gqa,
        error=ValueError,
        message=r"same number of heads unless enable_gqa=True, got \d+ and \d+",
        everywhere=False,
    ),
    "mask and causal": Fault(
        change=_mask_and("is_causal"),
        error=ValueError,
        message="attn_mask and is_causal must not both be given, got both; put",
    ),
    "mask and causal_lower_right": Fault(
        change=_mask_and("causal_lower_right"),
        error=ValueError,
        message="attn_mask and causal_lower_right must not both be given, got both; put",
        in_sdpa=False,
    ),
    "both causal flags": Fault(
        change=_set(is_causal=True, causal_lower_right=True, attn_mask=None),
        error=ValueError,
        message="is_causal and causal_lower_right must not both be given, got both; keep",
        in_sdpa=False,
    ),
    "mask that does not broadcast": Fault(
        change=_mask_of_wrong_shape,
        error=ValueError,
        message=r"attn_mask must broadcast to .* got shape",
    ),
    "mask of five dimensions": Fault(
        change=_mask(lambda q, k: torch.ones(1, 1, 1, q, k, dtype=torch.bool)),
        error=ValueError,
        message=r"attn_mask must broadcast to .* got shape \[1, 1, 1",
    ),
    "mask of integers": Fault(
        change=_mask(lambda q, k: torch.ones(q, k, dtype=torch.int64)),
        error=TypeError,
        message=r"attn_mask must be bool .* got torch\.int64; convert",
    ),
    "mask of 8 bits": Fault(
        change=_mask(lambda q, k: torch.zeros(q, k).to(torch.float8_e4m3fn)),
        error=TypeError,
        message=r"attn_mask must be bool .* got torch\.float8_e4m3fn; convert",
    ),
    "mask that is no tensor": Fault(
        change=_mask(lambda q, k: [[True] * k] * q),
        error=TypeError,
        message=r"attn_mask must be a torch\.Tensor, got list",
    ),
    "mask that is sparse": Fault(
        change=_mask(lambda q, k: torch.ones(q, k).bool().to_sparse()),
        error=TypeError,
        message=r"attn_mask must be a dense tensor, got layout torch\.sparse_coo; convert",
        in_sdpa=False,
    ),
    "scale is a text": Fault(
        change=_set(scale="1"), error=TypeError, message="scale must be a number or None, got '1'"
    ),
    "scale that no float holds": Fault(
        change=_set(scale=10**400),
        error=ValueError,
        message="scale must fit a float, got an int of 1329 bits; give a float",
    ),
    "is_causal is no bool": Fault(
        change=_set(is_causal=None, attn_mask=None),
        error=TypeError,
        message="is_causal must be True or False, got None",
    ),
    "causal_lower_right is no bool": Fault(
        change=_set(causal_lower_right=1),
        error=TypeError,
        message="causal_lower_right must be True or False, got 1",
        in_sdpa=False,
    ),
    "dropout": Fault(
        change=_set(dropout_p=0.25),
        error=NotImplementedError,
        message=r"dropout_p must be 0\.0 .* got 0\.25; use F\.scaled_dot_product_attention",
        everywhere=False,
        in_sdpa=False,
    ),
    "dropout is no number": Fault(
        change=_set(dropout_p=math.nan),
        error=NotImplementedError,
        message=r"dropout_p must be 0\.0 .* got nan; use",
        everywhere=False,
    ),
    "selector is none": Fault(
        change=_set(selector=0), error=TypeError, message="selector must be a selector .* got 0"
    ),
    "selector is a class": Fault(
        change=lambda arguments, case: arguments.update(selector=type(case.selector)),
        error=TypeError,
        message="selector must be a selector .* got <class",
    ),
}
