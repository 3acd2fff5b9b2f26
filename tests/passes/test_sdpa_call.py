"""What a call holds after tracing: numbers that no kernel takes symbolic become constants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from unisparse_flex.passes.calls.sdpa import SdpaCall


def symbolic_query() -> Any:
    """Fake queries [1, 4, s, 16] of a length that tracing does not know."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = [DimDynamic.STATIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(torch.randn(1, 4, 300, 16), symbolic_context=context)


@pytest.mark.parametrize("name", ["is_causal", "causal_lower_right"])
@pytest.mark.parametrize("limit", [1, 400])
def test_a_flag_computed_from_a_length_becomes_a_constant(limit: int, name: str) -> None:
    query = symbolic_query()
    flag = query.shape[2] > limit
    assert isinstance(flag, torch.SymBool)
    options: dict[str, Any] = {name: flag}
    call = SdpaCall(query=query, key=query, value=query, **options).with_constants()
    # Two symbolic flags cannot even be compared, which every cache of calls does.
    assert getattr(call, name) is (limit == 1)
    assert call.causal is (limit == 1)
    assert call.dropout_p == 0.0
    assert call.scale is None


@pytest.mark.parametrize("q_len", [4, 3])
@pytest.mark.parametrize(
    "other", [{"is_causal": True}, {"attn_mask": torch.ones(1, 4, dtype=torch.bool)}], ids=str
)
def test_what_goes_without_causal_lower_right_is_refused_dense_too(
    q_len: int, other: dict[str, Any]
) -> None:
    query, key = torch.ones(1, 1, q_len, 4), torch.ones(1, 1, 4, 4)
    call = SdpaCall(query=query, key=key, value=key, causal_lower_right=True, **other)
    with pytest.raises(ValueError, match="causal_lower_right must not both be given, got both"):
        call.run_dense()


def test_a_call_without_symbols_stays_itself() -> None:
    x = torch.ones(1, 1, 4, 4)
    call = SdpaCall(query=x, key=x, value=x)
    assert call.with_constants() is call


def test_arguments_given_twice_are_refused() -> None:
    x = torch.ones(1, 1, 4, 4)
    with pytest.raises(TypeError, match="dropout_p"):
        SdpaCall.bind((x, x, x, None, 0.0), {"dropout_p": 0.0})
    assert SdpaCall.bind((x, x, x), {}).dropout_p == 0.0
    assert SdpaCall.bind((x, x, x), {"dropout_p": 0.5}).dropout_p == 0.5
