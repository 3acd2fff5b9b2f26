"""`is_causal` means one thing everywhere, what it means in SDPA; `causal_lower_right` the other."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import flex_attention

import unisparse_flex
from unisparse_flex import (
    Selector,
    UniSparse,
    attention,
    block_masks,
    create_block_mask,
    distributed,
    passes,
    selectors,
)
from unisparse_flex.block_masks import BlockGeometry, SelectionCost
from unisparse_flex.distributed import ContextParallel, context_parallel_attention
from unisparse_flex.integrations import transformers
from unisparse_flex.passes import SparseConfig, calls
from unisparse_flex.passes.attend.marker import marked_sdpa
from unisparse_flex.passes.calls.sdpa import SdpaCall
from unisparse_flex.selectors import (
    DenseSpan,
    FlashPrefill,
    FlexPrefill,
    MInference,
    Oracle,
    StreamingLLM,
    XAttention,
)

from .models import qkv
from .reference import select, visible

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
SIZE = 16
FORCED: dict[str, Any] = {"sink_blocks": 0, "local_blocks": 1, "last_query_blocks": 0}
SELECTORS: tuple[Selector, ...] = (
    UniSparse(block_size=SIZE, c_q=4, c_k=4, top_p=0.5, **FORCED),
    XAttention(block_size=SIZE, stride=4, top_p=0.5, **FORCED),
    FlashPrefill(block_size=SIZE, alpha=0.6, **FORCED),
    Oracle(block_size=SIZE, top_p=0.5, **FORCED),
    StreamingLLM(block_size=SIZE, sink_tokens=4, local_tokens=18, last_query_tokens=3),
    FlexPrefill(block_size=SIZE, top_p=0.5, min_budget=16),
    MInference(block_size=SIZE, vertical_slash=(3, 2), last_q=8, sink_tokens=1),
)
FLAGS = ("is_causal", "causal_lower_right")
LENGTHS = [(64, 128), (128, 64), (1, 40), (40, 1), (63, 63), (50, 97), (97, 50), (127, 129)]


def keep_all(size: int = SIZE) -> UniSparse:
    return UniSparse(block_size=size, top_p=1.0)


def call_attention(q: Tensor, k: Tensor, v: Tensor, size: int, **flags: Any) -> Tensor:
    return attention(q, k, v, enable_gqa=True, selector=keep_all(size), **flags)


def call_block_mask(q: Tensor, k: Tensor, v: Tensor, size: int, **flags: Any) -> Tensor:
    mask = create_block_mask(q, k, selector=keep_all(size), **flags)
    output = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    assert isinstance(output, Tensor)
    return output


def call_select(q: Tensor, k: Tensor, v: Tensor, size: int, **flags: Any) -> Tensor:
    mask = keep_all(size).select(q, k, **flags).token_mask()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def call_context(q: Tensor, k: Tensor, v: Tensor, size: int, **flags: Any) -> Tensor:
    context = ContextParallel(block_size=size)
    return context_parallel_attention(q, k, v, context=context, selector=keep_all(size), **flags)


def call_sdpa_call(q: Tensor, k: Tensor, v: Tensor, size: int, **flags: Any) -> Tensor:
    call = SdpaCall(query=q, key=k, value=v, enable_gqa=True, **flags)
    sparse = marked_sdpa(call, SparseConfig(selector=keep_all(size), strict=True).encode())
    dense = marked_sdpa(call, SparseConfig(selector=keep_all(size), dense=True).encode())
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-12)
    return dense


Entry = Callable[..., Tensor]
# Every public callable that computes something with `is_causal`, each with all blocks kept.
ENTRIES: dict[str, Entry] = {
    "attention": call_attention,
    "create_block_mask": call_block_mask,
    "Selector.select": call_select,
    "context_parallel_attention": call_context,
    "SdpaCall": call_sdpa_call,
}
every_entry = pytest.mark.parametrize("entry", ENTRIES.values(), ids=list(ENTRIES))


@pytest.fixture(autouse=True, scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("ranks") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def offset_of(flag: str, q_len: int, kv_len: int) -> int:
    """The key position of query row 0."""
    return 0 if flag == "is_causal" else kv_len - q_len


@every_entry
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_is_causal_is_that_of_sdpa(entry: Entry, q_len: int, kv_len: int) -> None:
    tensors = qkv(q_len, kv_len, dtype=torch.float64, batch=2)
    expected = F.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    output = entry(*tensors, SIZE, is_causal=True)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    bias: Any = causal_upper_left(q_len, kv_len)
    same = F.scaled_dot_product_attention(*tensors, attn_mask=bias, enable_gqa=True)
    torch.testing.assert_close(output, same, rtol=0, atol=1e-12)


@every_entry
@pytest.mark.parametrize(("q_len", "kv_len"), [(q, k) for q, k in LENGTHS if q <= k])
def test_causal_lower_right_is_that_of_torch(entry: Entry, q_len: int, kv_len: int) -> None:
    tensors = qkv(q_len, kv_len, dtype=torch.float64, batch=2)
    bias: Any = causal_lower_right(q_len, kv_len)
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=bias, enable_gqa=True)
    output = entry(*tensors, SIZE, causal_lower_right=True)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    other = entry(*tensors, SIZE, is_causal=True)
    assert torch.allclose(output, other, rtol=0, atol=1e-12) is (q_len == kv_len)


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_means_the_same_compiled(flag: str) -> None:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Of a length, as models have it for decoding.
        flags: Any = {flag: query.shape[2] > 1}
        return attention(query, key, value, enable_gqa=True, selector=selector, **flags)

    selector = keep_all()
    torch._dynamo.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for q_len, kv_len in ((64, 128), (50, 97), (63, 63)):
        tensors = qkv(q_len, kv_len, dtype=torch.float64)
        pairs = visible(q_len, kv_len, offset_of(flag, q_len, kv_len))
        expected = F.scaled_dot_product_attention(*tensors, attn_mask=pairs, enable_gqa=True)
        torch.testing.assert_close(compiled(*tensors), expected, rtol=0, atol=1e-12)


@every_entry
@pytest.mark.parametrize(("q_len", "kv_len"), [(q, k) for q, k in LENGTHS if q > k])
def test_rows_without_keys_are_refused(entry: Entry, q_len: int, kv_len: int) -> None:
    with pytest.raises(
        (ValueError, NotImplementedError),
        match=r"causal_lower_right (must have q_len <= kv_len|with more queries than keys)",
    ):
        entry(*qkv(q_len, kv_len, dtype=torch.float64), SIZE, causal_lower_right=True)


@st.composite
def grids(draw: st.DrawFn) -> tuple[int, int, int]:
    """Query rows, keys and block size; the ragged ends of blocks more often."""
    size = draw(st.sampled_from([16, 32, 64]))
    edges = [n * size + step for n in range(4) for step in (-1, 0, 1)]
    length = st.sampled_from([e for e in edges if e > 0]) | st.integers(1, 3 * size + 1)
    return draw(length), draw(length), size


@pytest.mark.slow
@pytest.mark.parametrize("flag", FLAGS)
@settings(max_examples=25, deadline=None)
@given(grids())
def test_all_show_a_row_the_same_keys(flag: str, grid: tuple[int, int, int]) -> None:
    q_len, kv_len, size = grid
    if flag == "causal_lower_right" and q_len > kv_len:
        q_len, kv_len = kv_len, q_len
    # Each row averages the values that it sees: its output is positive there, and 0 elsewhere.
    query, key = torch.zeros(1, 1, q_len, 16), torch.zeros(1, 1, kv_len, 16)
    value = torch.eye(kv_len)[None, None]
    expected = visible(q_len, kv_len, offset_of(flag, q_len, kv_len))
    for name, entry in ENTRIES.items():
        output = entry(query, key, value, size, **{flag: True})
        assert (output[0, 0] > 0).equal(expected), name


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
@pytest.mark.parametrize("selector", SELECTORS, ids=lambda s: type(s).__name__)
def test_every_selector_selects_for_the_rows_as_they_stand(
    selector: Selector, q_len: int, kv_len: int, flag: str
) -> None:
    query, key, _ = qkv(q_len, kv_len, dtype=torch.float64)
    if flag == "causal_lower_right" and q_len > kv_len:
        with pytest.raises(ValueError, match="causal_lower_right must have q_len <= kv_len"):
            selector.select(query, key, causal_lower_right=True)
        return
    offset = offset_of(flag, q_len, kv_len)
    flags: dict[str, Any] = {flag: True}
    selection = selector.select(query, key, **flags)
    assert selection.geometry.causal_offset == offset
    assert selection.keep.equal(select(selector, query, key, offset=offset).keep)
    seen, kept = visible(q_len, kv_len, offset), selection.token_mask()
    assert not (kept & ~seen).any()
    assert kept.any(-1).all()
    # A row's own position, as far as there are keys.
    assert kept.diagonal(offset, -2, -1).all()


def test_the_selectors_here_are_all_but_the_one_for_equal_lengths() -> None:
    public = [getattr(selectors, name) for name in selectors.__all__]
    public = [cls for cls in public if inspect.isclass(cls) and issubclass(cls, Selector)]
    assert {type(selector) for selector in SELECTORS} == set(public) - {Selector, DenseSpan}
    span = DenseSpan(selector=keep_all(), tokens="3:20")
    assert not span.supports(causal=True, masked=False, self_attention=False)


@pytest.mark.parametrize("flag", [*FLAGS, None])
@given(grids())
def test_the_cost_of_a_selection_counts_the_blocks_that_its_rows_see(
    flag: str | None, grid: tuple[int, int, int]
) -> None:
    rows, columns = -(-grid[0] // grid[2]), -(-grid[1] // grid[2])
    q_len, kv_len = rows * 16, columns * 16
    if flag == "causal_lower_right" and q_len > kv_len:
        q_len, kv_len = kv_len, q_len
    offset = None if flag is None else offset_of(flag, q_len, kv_len)
    geometry = BlockGeometry(q_len=q_len, kv_len=kv_len, block_size=16, causal_offset=offset)
    seen = int(geometry.visible_blocks(torch.device("cpu")).sum())
    cost = SelectionCost(row_blocks=1, share=0.0)
    flags: dict[str, Any] = {} if flag is None else {flag: True}
    density = cost.density(q_len=q_len, kv_len=kv_len, block_size=16, **flags)
    assert density * seen == pytest.approx(geometry.num_q_blocks)
    with pytest.raises(ValueError, match="is_causal and causal_lower_right must not both be given"):
        cost.density(
            q_len=q_len, kv_len=kv_len, block_size=16, is_causal=True, causal_lower_right=True
        )


MODULES = (unisparse_flex, selectors, block_masks, passes, calls, distributed, transformers)


def public_callables(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """What a module offers: functions, classes and their public methods, by name."""
    for name in module.__all__:
        thing = getattr(module, name)
        # What checks arguments computes nothing with them.
        if not callable(thing) or name.startswith("validate_"):
            continue
        yield name, thing
        if inspect.isclass(thing):
            for attribute, member in vars(thing).items():
                if inspect.isfunction(member) and not attribute.startswith("_"):
                    yield f"{name}.{attribute}", member


def is_causal_takers() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in MODULES:
        for name, thing in public_callables(module):
            try:
                parameters = inspect.signature(thing).parameters
            except ValueError:
                continue
            if FLAGS[0] in parameters or FLAGS[1] in parameters:
                found[name] = thing
    return found


TAKERS = is_causal_takers()


def test_whatever_takes_is_causal_is_compared_with_sdpa_here() -> None:
    assert set(TAKERS) == {*ENTRIES, "SelectionCost.density"}


@pytest.mark.parametrize("name", sorted(TAKERS))
def test_whatever_takes_is_causal_says_that_it_is_sdpas_and_takes_the_other_too(name: str) -> None:
    parameters = inspect.signature(TAKERS[name]).parameters
    text = " ".join((inspect.getdoc(TAKERS[name]) or "").split())
    for flag in FLAGS:
        assert parameters[flag].default is False
    said = re.search(r" is_causal: (.*?) (?=\w+: )", text)
    assert said is not None
    assert re.search(r"[Rr]ow r .*sees (the )?keys up to r \(top-left\), as (in )?SDPA", said[1])
    said = re.search(r" causal_lower_right: (.*)", text)
    assert said is not None
    assert re.match(r".*?[Rr]ow r .*?sees (the )?keys up to r \+ \w+ - \w+, so that the", said[1])
    assert "the last row is aligned with the last key" in said[1]
