"""`DeferredMask`: to a model a mask like any other, to an attention call a formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from tests.api.models import qkv
from unisparse_flex.integrations.deferred_mask import DeferredMask
from unisparse_flex.passes.calls.sdpa import SdpaCall

BATCH, LENGTH = 2, 50
PADDING = torch.arange(LENGTH) >= torch.tensor([[0], [7]])


class Counted:
    """A causal mask with padding that counts how often it is computed."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, offset: int = 0) -> Tensor:
        if isinstance(offset, int):
            self.times += 1
        rows, keys = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
        return (keys <= rows + offset) & PADDING[:, None, None, :]


def deferred(compute: Any = None, numbers: tuple[int, ...] = ()) -> DeferredMask:
    compute = Counted() if compute is None else compute
    return DeferredMask(compute, numbers, shape=(BATCH, 1, LENGTH, LENGTH), device="cpu")


def call() -> SdpaCall:
    query, key, value = qkv(LENGTH, batch=BATCH)
    return SdpaCall(query=query, key=key, value=value, enable_gqa=True)


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced": lambda mask: mask[:, :, -3:, :40],
    "inverted": lambda mask: ~mask,
    "combined": lambda mask: mask & mask.transpose(-1, -2),
    "additive": lambda mask: torch.where(mask, 0.0, -torch.inf),
    "filled": lambda mask: torch.zeros(LENGTH, LENGTH).masked_fill(~mask, -1.0),
    "cast": lambda mask: mask.to(torch.float32),
    "expanded": lambda mask: mask.expand(BATCH, 4, LENGTH, LENGTH).contiguous(),
    "summed": lambda mask: mask.sum(-1),
    "joined": lambda mask: torch.cat((mask, mask), dim=0),
    "indexed": lambda mask: mask[torch.arange(BATCH)],
    "cloned": lambda mask: mask.clone(),
    "in attention": lambda mask: F.scaled_dot_product_attention(
        *qkv(LENGTH, heads=(2, 2), batch=BATCH), mask
    ),
}


@pytest.mark.parametrize("use", USES)
def test_it_does_what_the_computed_mask_does(use: str) -> None:
    output = USES[use](deferred())
    assert type(output) is Tensor
    assert output.equal(USES[use](Counted()()))


def test_it_is_a_tensor_that_is_computed_once_and_only_where_it_is_read() -> None:
    compute = Counted()
    mask = deferred(compute)
    assert isinstance(mask, Tensor)
    assert mask.shape == (BATCH, 1, LENGTH, LENGTH)
    assert (mask.dtype, mask.ndim, mask.device.type) == (torch.bool, 4, "cpu")
    assert mask.to("cpu") is mask
    assert "DeferredMask" in repr(mask)
    assert compute.times == 0
    assert (mask & mask).equal(mask | mask)
    assert compute.times == 1


def test_a_call_gets_a_formula_and_nothing_is_computed() -> None:
    compute = Counted()
    bound = deferred(compute, (3,)).bind(call())
    assert bound.attn_mask is None
    program = bound.mask_program()
    assert program is not None
    seen = program.pairs(torch.arange(LENGTH), torch.arange(LENGTH))
    assert compute.times == 0
    assert seen.equal(compute(3))


def test_causality_becomes_a_flag() -> None:
    def causal() -> Tensor:
        return torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()

    def by_index() -> Tensor:
        return (torch.arange(LENGTH) <= torch.arange(LENGTH)[:, None]).expand(BATCH, 1, -1, -1)

    bound = deferred(by_index).bind(call())
    assert (bound.is_causal, bound.causal_lower_right, bound.mask) == (True, False, "")
    assert deferred(causal).bind(call()).attn_mask is None


def test_what_hides_nothing_is_no_mask() -> None:
    def everything() -> Tensor:
        return (torch.arange(LENGTH) >= 0).expand(BATCH, 1, LENGTH, LENGTH)

    bound = deferred(everything).bind(call())
    assert (bound.attn_mask, bound.is_causal, bound.mask) == (None, False, "")


def test_what_is_not_proved_is_computed() -> None:
    pairs = torch.rand(BATCH, 1, LENGTH, LENGTH) < 0.5
    bound = deferred(lambda: pairs & pairs).bind(call())
    assert bound.attn_mask is not None
    assert bound.attn_mask.equal(pairs)


def test_a_call_of_other_lengths_gets_the_computed_mask() -> None:
    query, key, value = qkv(LENGTH - 1, batch=BATCH)
    bound = deferred().bind(SdpaCall(query=query, key=key, value=value))
    assert bound.attn_mask is not None
    assert bound.attn_mask.equal(Counted()())


BEYOND: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "batch": lambda b, q, kv: (kv <= q) & PADDING[:1][b, kv],
    "keys": lambda b, q, kv: (kv <= q) & PADDING[:, 1:][b, kv],
    "keys at an offset": lambda b, q, kv: (kv <= q) & PADDING[b, kv + 1],
    "queries": lambda b, q, kv: (kv <= q) & PADDING[:, :-9][b, q],
}


@pytest.mark.parametrize("use_vmap", [False, True])
@pytest.mark.parametrize("name", BEYOND)
def test_what_reads_beyond_a_tensor_fails_as_the_computed_mask_does(
    name: str, use_vmap: bool
) -> None:
    def compute() -> Tensor:
        b, rows = torch.arange(BATCH), torch.arange(LENGTH)
        if not use_vmap:
            return BEYOND[name](b[:, None, None, None], rows[:, None], rows)
        seen = torch.vmap(BEYOND[name], in_dims=(None, None, 0))
        seen = torch.vmap(seen, in_dims=(None, 0, None))
        with TransformGetItemToIndex():
            return torch.vmap(seen, in_dims=(0, None, None))(b, rows, rows)[:, None]

    with pytest.raises(IndexError) as expected:
        compute()
    with pytest.raises(IndexError) as raised:
        deferred(compute).bind(call())
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_takes_it(backend: str) -> None:
    torch._dynamo.reset()
    query, key, value = qkv(LENGTH, heads=(2, 2), batch=BATCH)

    def attend(mask: Tensor, query: Tensor) -> Tensor:
        mask = mask.compute() if isinstance(mask, DeferredMask) else mask
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    expected = attend(Counted()(), query)
    for _ in range(2):
        torch.testing.assert_close(compiled(deferred(), query), expected)
