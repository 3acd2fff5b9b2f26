"""`attention` is F.scaled_dot_product_attention over the kept blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from unisparse_flex import UniSparse, attention
from unisparse_flex.passes.attend import marker
from unisparse_flex.selectors import DEFAULT_SELECTOR

from .models import qkv
from .reference import attend, rmse

KEEP_ALL = UniSparse(block_size=16, top_p=1.0)
FEW = UniSparse(block_size=16, c_q=4, c_k=4, top_k=2)
LENGTH = 150


def masks(q_len: int, kv_len: int, batch: int = 2, heads: int = 4) -> dict[str, Tensor]:
    """bool and float masks of every broadcastable kind; each row keeps some key."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    causal = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    window = causal & ~causal.tril(-40)
    padding = torch.arange(kv_len) < torch.tensor([kv_len, kv_len - 37])[:, None]
    additive = torch.zeros(q_len, kv_len).masked_fill(~window, torch.finfo(torch.float32).min)
    return {
        "bool": causal,
        "bool window": window,
        "bool padding": padding[:, None, None, :],
        "bool padding of 1 and a head": (padding[:1, None, None, :]).expand(1, heads, 1, kv_len),
        "bool whole": (padding[:, None, None, :] & causal).expand(batch, heads, q_len, kv_len),
        "float": normal(q_len, kv_len),
        "float per head": normal(1, heads, q_len, kv_len),
        "float per key": normal(1, kv_len),
        "float per query": normal(heads, q_len, 1),
        "float of the batch": normal(batch, 1, 1, kv_len),
        "float at the dtype's minimum": additive,
        "float at infinity": additive.masked_fill(~window, -torch.inf),
        "float per head, hiding": normal(heads, q_len, kv_len).masked_fill(~window, -torch.inf),
    }


MASKS = list(masks(1, 1))
CALLS: list[dict[str, Any]] = [
    {},
    {"is_causal": True},
    {"is_causal": True, "kv_len": 220},
    {"is_causal": True, "kv_len": 70},
    {"kv_len": 220},
    {"kv_len": 37},
    {"is_causal": True, "heads": (4, 4), "enable_gqa": False},
    {"is_causal": True, "heads": (6, 2)},
    {"heads": (4, 1), "value_dim": 24},
    {"is_causal": True, "value_dim": 1},
    {"is_causal": True, "scale": 1.0},
    {"scale": 0.0},
    {"is_causal": True, "q_len": 1},
    {"is_causal": True, "q_len": 17},
    {"kv_len": 1},
]


def split(call: dict[str, Any]) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Tensors and options of one call; grouped heads and a batch of 2 unless it says otherwise."""
    shape: dict[str, Any] = {"q_len": LENGTH, "batch": 2, "heads": (4, 2), "dtype": torch.float64}
    names = ("q_len", "kv_len", "heads", "value_dim", "batch", "dtype")
    shape |= {name: call[name] for name in names if name in call}
    options = {name: value for name, value in call.items() if name not in names}
    return qkv(**shape), {"enable_gqa": True} | options


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_with_every_block_kept_it_is_sdpa(call: dict[str, Any]) -> None:
    tensors, options = split(call)
    output = attention(*tensors, **options, selector=KEEP_ALL)
    expected = F.scaled_dot_product_attention(*tensors, **options)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_below_that_it_is_sdpa_over_the_kept_blocks(call: dict[str, Any]) -> None:
    tensors, options = split(call)
    output = attention(*tensors, **options, selector=FEW)
    offset = 0 if options.get("is_causal") else None
    expected = attend(*tensors, selector=FEW, offset=offset, scale=options.get("scale"))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_len", [LENGTH, 181])
def test_with_every_block_kept_masks_do_what_they_do_in_sdpa(mask: str, kv_len: int) -> None:
    tensors, _ = split({"kv_len": kv_len})
    attn_mask = masks(LENGTH, kv_len)[mask]
    attn_mask = attn_mask if attn_mask.dtype is torch.bool else as_double(attn_mask)
    output = attention(*tensors, attn_mask, enable_gqa=True, selector=KEEP_ALL)
    expected = F.scaled_dot_product_attention(*tensors, attn_mask, enable_gqa=True)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS)
def test_below_that_masks_hold_within_the_kept_blocks(mask: str) -> None:
    tensors, _ = split({"kv_len": 181})
    attn_mask = masks(LENGTH, 181)[mask]
    attn_mask = attn_mask if attn_mask.dtype is torch.bool else as_double(attn_mask)
    output = attention(*tensors, attn_mask, enable_gqa=True, selector=FEW)
    expected = attend(*tensors, selector=FEW, attn_mask=attn_mask)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def as_double(mask: Tensor) -> Tensor:
    """The same mask for float64 tensors, its minimum that of the dtype."""
    hidden = mask == torch.finfo(mask.dtype).min
    return mask.double().masked_fill(hidden, torch.finfo(torch.float64).min)


@pytest.mark.parametrize("kv_len", [LENGTH, 151, 220])
def test_causal_lower_right_ends_where_the_keys_end(kv_len: int) -> None:
    tensors, _ = split({"kv_len": kv_len})
    bias: Any = causal_lower_right(LENGTH, kv_len)
    output = attention(*tensors, attn_mask=bias, enable_gqa=True, selector=FEW)
    offset = kv_len - LENGTH
    torch.testing.assert_close(
        output, attend(*tensors, selector=FEW, offset=offset), rtol=0, atol=1e-12
    )
    token_mask = FEW.select(*tensors[:2], causal_lower_right=True).token_mask()
    masked = F.scaled_dot_product_attention(*tensors, attn_mask=token_mask, enable_gqa=True)
    torch.testing.assert_close(output, masked, rtol=0, atol=1e-12)
    flag = attention(*tensors, causal_lower_right=True, enable_gqa=True, selector=FEW)
    assert output.equal(flag)


@pytest.mark.parametrize("kv_len", [70, LENGTH, 220])
def test_causal_upper_left_is_is_causal(kv_len: int) -> None:
    tensors, _ = split({"kv_len": kv_len})
    bias: Any = causal_upper_left(LENGTH, kv_len)
    output = attention(*tensors, attn_mask=bias, enable_gqa=True, selector=FEW)
    flag = attention(*tensors, is_causal=True, enable_gqa=True, selector=FEW)
    assert output.equal(flag)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_output_has_the_dtype_of_the_query(dtype: torch.dtype) -> None:
    tensors, _ = split({"dtype": dtype})
    output = attention(*tensors, is_causal=True, enable_gqa=True, selector=FEW)
    assert output.dtype is dtype
    exact = attend(*tensors, selector=FEW, offset=0)
    plain = attend(*tensors, selector=FEW, offset=0, dtype=dtype)
    assert rmse(output, exact) <= 2 * rmse(plain, exact)


def test_elements_of_a_batch_do_not_meet() -> None:
    tensors, _ = split({"batch": 3})
    together = attention(*tensors, is_causal=True, enable_gqa=True, selector=FEW)
    for i in range(3):
        query, key, value = (t[i : i + 1] for t in tensors)
        output = attention(query, key, value, is_causal=True, enable_gqa=True, selector=FEW)
        torch.testing.assert_close(output, together[i : i + 1], rtol=0, atol=1e-12)


def test_the_default_selector_is_the_one_that_is_named_so() -> None:
    tensors, _ = split({"q_len": 600})
    output = attention(*tensors, is_causal=True, enable_gqa=True)
    own = attention(*tensors, is_causal=True, enable_gqa=True, selector=DEFAULT_SELECTOR)
    assert output.equal(own)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["query", "key"])
@pytest.mark.parametrize("position", [0, 77, LENGTH - 1])
def test_what_is_not_finite_reaches_the_rows_that_see_it(
    bad: float, where: str, position: int
) -> None:
    tensors, _ = split({"heads": (4, 4)})
    tensors[0 if where == "query" else 1][1, 2, position, 3] = bad
    output = attention(*tensors, is_causal=True, selector=FEW)
    query, key, value = tensors
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    logits = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
    assert output.isnan().equal((logits.softmax(-1) @ value).isnan())


def test_a_call_changes_neither_its_inputs_nor_the_next_call() -> None:
    tensors, options = split({"is_causal": True})
    copies = [t.clone() for t in tensors]
    first = attention(*tensors, **options, selector=FEW)
    assert attention(*tensors, **options, selector=FEW).equal(first)
    assert all(a.equal(b) for a, b in zip(tensors, copies, strict=True))


def test_an_uncompiled_call_says_once_that_it_gains_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    marker._said.clear()
    query, key, value = qkv(LENGTH)
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    padding = causal & (torch.arange(LENGTH) < LENGTH - 9)
    for _ in range(2):
        attention(query, key, value, is_causal=True, enable_gqa=True, selector=FEW)
        attention(query, key, value, attn_mask=padding, enable_gqa=True, selector=FEW)
    said = [record for record in caplog.records if "runs uncompiled" in record.getMessage()]
    assert [record.levelname for record in said] == ["WARNING"] * 2
    plain, masked = (record.getMessage() for record in said)
    assert "times as long" in plain
    assert plain.endswith("model.compile()")
    assert "slower than dense attention; run\n  prompts of one length" in masked
    assert max(len(row) for text in (plain, masked) for row in text.splitlines()) <= 79
    assert not any(text in masked for text in ("times as long", "compile()"))
    # Compiled, a kernel reads this one.
    marker._said.clear()
    caplog.clear()
    window = causal & ~torch.ones(LENGTH, LENGTH).tril(-40).bool()
    attention(query, key, value, attn_mask=window, enable_gqa=True, selector=FEW)
    (windowed,) = (record.getMessage() for record in caplog.records)
    assert "which is slower than dense attention alone; call" in windowed
    assert "times as long" not in windowed
