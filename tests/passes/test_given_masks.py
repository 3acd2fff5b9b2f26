"""Masks that a compiled graph is given: read when it is compiled, and guarded by what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

from tests.block_masks.test_mask_contents import masks
from unisparse_flex import UniSparse, optimize
from unisparse_flex.block_masks.masks import mask_table, read_mask
from unisparse_flex.passes import SparseConfig, rewrite_sdpa
from unisparse_flex.passes.masks import Unproved
from unisparse_flex.passes.masks.entries import PairEntries, read_entries
from unisparse_flex.passes.rewrite import RewriteReport

LENGTH, HEADS, BATCH = 192, 4, 2
ALL = UniSparse(block_size=32, top_p=1.0)
EVERYTHING = SparseConfig(selector=ALL, min_length=0, min_queries=32)
SOME = SparseConfig(selector=UniSparse(block_size=32, top_p=0.5), min_length=0)
ROW, KEY = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
CAUSAL = KEY <= ROW
IDS = torch.arange(LENGTH) // 50
LOWEST = torch.finfo(torch.float32).min

How = Callable[[Tensor, Tensor, Tensor], Tensor]


def sliced(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return mask[..., : query.shape[2], : key.shape[2]]


class Kept(nn.Module):
    """Attention under a mask that the module keeps in a buffer."""

    mask: Tensor

    def __init__(self, mask: Tensor, how: How = sliced) -> None:
        super().__init__()
        self.register_buffer("mask", mask.clone(), persistent=False)
        self.how = how

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = self.how(self.mask, query, key)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Handed(nn.Module):
    """Attention under a mask that comes with the call."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Compiled:
    """A module behind Dynamo and the pass; what is left runs as it stands in the graph."""

    def __init__(self, run: Any, config: SparseConfig = EVERYTHING, **options: Any) -> None:
        self.reports: list[RewriteReport] = []
        self.graphs: list[fx.GraphModule] = []
        self.config = config
        self.run = torch.compile(run, backend=self._backend, fullgraph=True, **options)

    def _backend(self, gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.reports.append(rewrite_sdpa(gm, self.config))
        self.graphs.append(gm)
        return gm.forward

    def __call__(self, *args: Any) -> Tensor:
        with torch.no_grad():
            output: Tensor = self.run(*args)
        return output

    @property
    def said(self) -> list[str]:
        """What the masks of each graph were proved to be, or why they were not."""
        return [
            str(said) for r in self.reports for said in (*r.masks.values(), *r.unproved.values())
        ]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tokens(q_len: int = 128, kv_len: int | None = None, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (q_len, kv_len or q_len, kv_len or q_len)
    return tuple(torch.randn(BATCH, HEADS, n, 16, generator=generator) for n in lengths)


def assert_dense(compiled: Compiled, module: nn.Module, *args: Tensor) -> None:
    """Asserts that every block kept gives what the module computes without a pass."""
    with torch.no_grad():
        expected = module(*args)
    torch.testing.assert_close(compiled(*args), expected, rtol=1e-4, atol=1e-5)


def window(width: int) -> Tensor:
    return CAUSAL & (ROW - width < KEY)


def padded(*starts: int) -> Tensor:
    """[B, 1, S, S], each row's own key visible, so that dense attention is defined."""
    own = KEY == ROW
    return torch.stack([CAUSAL & (start <= KEY) | own for start in starts])[:, None]


PROVED: dict[str, tuple[str, Tensor, How]] = {
    "bool": ("causal", CAUSAL, sliced),
    "of four dimensions": ("causal", CAUSAL[None, None], sliced),
    "added": ("causal", torch.full((LENGTH, LENGTH), -torch.inf).triu(1), sliced),
    "added, lowest number": ("causal", torch.where(CAUSAL, 0.0, LOWEST), sliced),
    "ones": ("causal", CAUSAL.float()[None, None], lambda m, q, k: sliced(m, q, k) != 0),
    "bytes": ("causal", CAUSAL.to(torch.uint8), lambda m, q, k: sliced(m, q, k).bool()),
    "inverted": ("causal", ~CAUSAL, lambda m, q, k: ~sliced(m, q, k)),
    "filled": (
        "causal",
        CAUSAL[None, None],
        lambda m, q, k: torch.zeros(128, 128).masked_fill(sliced(m, q, k) == 0, -torch.inf),
    ),
    "expanded": (
        "causal",
        CAUSAL[None, None],
        lambda m, q, k: sliced(m, q, k).expand(BATCH, HEADS, -1, -1),
    ),
    "repeated for heads": ("causal", CAUSAL.repeat(1, HEADS, 1, 1), sliced),
    "transposed": ("other", CAUSAL.mT.contiguous(), lambda m, q, k: sliced(m, q, k).mT),
    "joined": (
        "causal, key padding",
        CAUSAL,
        lambda m, q, k: sliced(m, q, k) & (k[:, :1, None, :, 0] < 9),
    ),
    "window": ("causal, sliding window 40", window(40), sliced),
    "chunks": ("causal, window by position", CAUSAL & (KEY // 32 == ROW // 32), sliced),
    "documents": ("causal, window by position", CAUSAL & (IDS[:, None] == IDS), sliced),
    "prefix": ("causal by position", CAUSAL | (KEY < 40), sliced),
    "padding": ("causal, key padding", CAUSAL & ((KEY < 30) | (KEY > 33)), sliced),
    "padding by batch element": (
        "causal, key padding",
        torch.stack([CAUSAL & ((KEY > 2) | (KEY < 1)), CAUSAL & ((KEY < 7) | (KEY > 9))])[:, None],
        sliced,
    ),
    "everything": ("everything", torch.zeros(LENGTH, LENGTH), sliced),
}

UNPROVED: dict[str, tuple[Unproved, Tensor]] = {
    "random": (Unproved.PAIRS, torch.rand(LENGTH, LENGTH) < 0.5),
    "one pair more": (Unproved.PAIRS, CAUSAL | ((ROW == 9) & (KEY == 100)) | (KEY == 60)),
    "bias": (Unproved.BIAS, torch.where(CAUSAL, 0.5, -torch.inf)),
    "three values": (Unproved.BIAS, torch.where(CAUSAL, (KEY < 3) * 1.0, -torch.inf)),
    "heads": (Unproved.HEADS, torch.stack([window(20 * (h + 1)) for h in range(HEADS)])[None]),
    "one head unlike": (
        Unproved.HEADS,
        torch.stack([CAUSAL, CAUSAL, CAUSAL, window(50)])[None],
    ),
}


@pytest.mark.parametrize("name", PROVED)
def test_a_mask_in_a_buffer_is_what_its_entries_say(name: str) -> None:
    kind, mask, how = PROVED[name]
    module = Kept(mask, how)
    compiled = Compiled(module)
    assert_dense(compiled, module, *tokens())
    assert compiled.said == [kind]


@pytest.mark.parametrize("name", UNPROVED)
def test_a_mask_in_a_buffer_that_is_no_interval_of_keys_stays_a_tensor(name: str) -> None:
    reason, mask = UNPROVED[name]
    module = Kept(mask)
    compiled = Compiled(module)
    assert_dense(compiled, module, *tokens())
    assert compiled.said == [str(reason)]
    module.mask.fill_(1)
    assert_dense(compiled, module, *tokens())
    assert len(compiled.graphs) == 1


def test_blocks_are_those_of_a_causal_call() -> None:
    query, key, value = tokens(192)
    compiled = Compiled(Kept(CAUSAL), SOME)
    flag = Compiled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), SOME)
    assert compiled(query, key, value).equal(flag(query, key, value))
    assert (
        compiled.graphs[0]
        .graph.find_nodes(op="call_function", target=torch.ops.unisparse.sdpa.default)[0]
        .args[5]
    )


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "a pair": lambda mask: mask[3].fill_(True),
    "a view": lambda mask: mask.t()[100:].zero_(),
    "all": lambda mask: mask.copy_(window(20)),
    "detached": lambda mask: mask.detach().logical_or_(KEY < 50),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("calls", [1, 4])
def test_a_buffer_that_is_changed_in_place_is_noticed(name: str, calls: int) -> None:
    module = Kept(CAUSAL)
    compiled = Compiled(module)
    for _ in range(calls):
        assert_dense(compiled, module, *tokens())
    assert len(compiled.graphs) == 1
    CHANGES[name](module.mask)
    assert_dense(compiled, module, *tokens())
    assert len(compiled.graphs) == 2
    module.mask.copy_(CAUSAL)
    assert_dense(compiled, module, *tokens())


def test_a_buffer_that_is_replaced_is_read_again() -> None:
    module = Kept(CAUSAL)
    compiled = Compiled(module)
    assert_dense(compiled, module, *tokens())
    module.mask = CAUSAL.clone()
    assert_dense(compiled, module, *tokens())
    assert compiled.said == ["causal"]
    module.mask = window(30)
    assert_dense(compiled, module, *tokens())
    assert compiled.said == ["causal", "causal, sliding window 30"]
    module.load_state_dict({}, strict=False)
    module.to(torch.float64).to(torch.float32)
    assert_dense(compiled, module, *tokens())
    assert len(compiled.graphs) == 2


def test_a_buffer_is_asked_at_each_call_where_guards_of_unchanged_modules_are_not() -> None:
    """Dynamo may leave out guards of modules whose attributes are the same objects as before."""
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True):
        module = Kept(CAUSAL)
        compiled = Compiled(module)
        for _ in range(10):
            compiled(*tokens())
        module.mask[:, 100:].zero_()
        assert_dense(compiled, module, *tokens())
        assert len(compiled.graphs) == 2


def test_layers_with_buffers_of_their_own_share_a_graph() -> None:
    layers = [Kept(CAUSAL) for _ in range(4)] + [Kept(window(30)) for _ in range(4)]
    reports: list[RewriteReport] = []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        reports.append(rewrite_sdpa(gm, EVERYTHING))
        return gm.forward

    inputs = tokens()
    for layer in layers:
        with torch.no_grad():
            expected = layer(*inputs)
        layer.compile(backend=backend, fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(layer(*inputs), expected, rtol=1e-4, atol=1e-5)
    said = [said for report in reports for said in report.masks.values()]
    assert said == ["causal", "causal, sliding window 30"]


def test_layers_that_are_compiled_one_by_one_read_a_mask_once_a_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = 0

    def count(tensor: Tensor) -> Any:
        nonlocal reads
        reads += 1
        return read_entries(tensor)

    monkeypatch.setattr("unisparse_flex.passes.masks.entries.read_entries", count)
    layers, reports = [Handed() for _ in range(3)], []

    def backend(gm: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        reports.append(rewrite_sdpa(gm, EVERYTHING))
        return gm.forward

    for layer in layers:
        layer.compile(backend=backend, fullgraph=True)
    for starts in ((3, 50), (20, 1)):
        mask = padded(*starts)
        for layer in layers:
            with torch.no_grad():
                layer(*tokens(LENGTH), mask)
        assert reads == 1
        reads = 0
    said = [list(report.masks.values()) for report in reports]
    assert said == [["causal, window by position"]]


def test_a_buffer_that_keeps_changing_stays_a_tensor() -> None:
    module = Kept(CAUSAL)
    compiled = Compiled(module)
    for width in range(10, 90, 10):
        module.mask.copy_(window(width))
        assert_dense(compiled, module, *tokens())
    widths = [f"causal, sliding window {width}" for width in (10, 20, 30, 40)]
    assert compiled.said == [*widths, str(Unproved.CHANGES)]


def test_masks_of_batches_that_differ_in_padding_alone_share_a_graph() -> None:
    module = Handed()
    compiled = Compiled(module)
    for starts in ((0, 50), (70, 3), (90, 91), (0, 0)):
        mask = padded(*starts)[..., :128, :128]
        assert_dense(compiled, module, *tokens(), mask)
    assert len(set(compiled.said)) == len(compiled.said) <= 2


def test_a_mask_that_comes_with_the_call_is_read_anew() -> None:
    module = Handed()
    compiled = Compiled(module)
    for mask in (CAUSAL, CAUSAL.clone(), window(40), CAUSAL.clone()):
        assert_dense(compiled, module, *tokens(LENGTH), mask)
    assert compiled.said == ["causal", "causal, sliding window 40"]


@pytest.mark.parametrize("keep", [nn.Parameter, lambda mask: mask])
def test_a_mask_in_a_parameter_or_attribute_is_read(keep: Callable[..., Any]) -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = keep(torch.where(CAUSAL, 0.0, -torch.inf))

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias)

    module = Held().requires_grad_(False)
    compiled = Compiled(module)
    assert_dense(compiled, module, *tokens(LENGTH))
    assert compiled.said == ["causal"]
    module.bias[5, 0] = 0.25
    assert_dense(compiled, module, *tokens(LENGTH))
    assert compiled.said == ["causal", str(Unproved.BIAS)]


@pytest.mark.parametrize("mask", [CAUSAL, window(40)], ids=["causal", "window"])
def test_lengths_that_differ_share_a_graph(mask: Tensor) -> None:
    module = Kept(mask)
    compiled = Compiled(module, dynamic=True)
    for length in (100, 128, 77, 190):
        assert_dense(compiled, module, *tokens(length))
    assert len(compiled.graphs) == 1
    module.mask[:] = True
    assert_dense(compiled, module, *tokens(101))


class StaticCache(nn.Module):
    """Rows of a mask are looked up by position, keys lie in a cache of a fixed length."""

    causal_mask: Tensor
    keys: Tensor
    values: Tensor

    def __init__(self, mask: Tensor = CAUSAL) -> None:
        super().__init__()
        self.register_buffer("causal_mask", mask.clone(), persistent=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(BATCH, HEADS, LENGTH, 16), persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, input_pos: Tensor) -> Tensor:
        mask = self.causal_mask[None, None, input_pos]
        self.keys[:, :, input_pos] = key
        self.values[:, :, input_pos] = value
        return F.scaled_dot_product_attention(query, self.keys, self.values, attn_mask=mask)


def test_rows_that_a_static_cache_looks_up_by_position() -> None:
    module, reference = StaticCache(), StaticCache()
    compiled = Compiled(module)
    for start, length in ((0, 96), (96, 1), (97, 1), (98, 40), (138, 1), (0, 96)):
        inputs = (*tokens(length, seed=start), torch.arange(start, start + length))
        assert_dense(compiled, reference, *inputs)
    # A prompt, and a later piece of one, of which only that it stands at some positions is known.
    assert compiled.said == ["causal", "causal by position"]


LOOKED_UP = {
    "causal": CAUSAL,
    "window": window(30),
    "added": torch.where(window(30), 0.0, -torch.inf),
    "documents": CAUSAL & (IDS[:, None] == IDS),
    "prefix": CAUSAL | (KEY < 40),
    "padding": CAUSAL & ((KEY < 30) | (KEY > 33)),
    "rows hidden": CAUSAL & (ROW % 7 > 0),
}


@pytest.mark.parametrize("name", LOOKED_UP)
def test_positions_may_be_any(name: str) -> None:
    """Also from the end, out of order, and repeated."""
    module = StaticCache(LOOKED_UP[name])

    class Looked(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, at: Tensor) -> Tensor:
            looked = module.causal_mask[at]
            return F.scaled_dot_product_attention(query, key, value, attn_mask=looked)

    looked = Looked()
    compiled = Compiled(looked)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        at = torch.randint(-LENGTH, LENGTH, (64,), generator=generator)
        assert_dense(compiled, looked, *tokens(64, LENGTH), at)
    assert len(compiled.graphs) == 1
    assert list(compiled.reports[0].unproved) == []


def test_a_graph_that_writes_to_the_mask_proves_nothing_of_it() -> None:
    class Writes(Kept):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.mask[0, 1] = query[0, 0, 0, 0] > 0
            return super().forward(query, key, value)

    module, reference = Writes(CAUSAL), Writes(CAUSAL)
    compiled = Compiled(module)
    assert_dense(compiled, reference, *tokens())
    assert compiled.said == [str(Unproved.MUTATED)]


def test_a_graph_that_writes_to_the_memory_of_the_mask_by_another_name_proves_nothing() -> None:
    class Aliased(Kept):
        def __init__(self) -> None:
            super().__init__(CAUSAL)
            self.row = self.mask[0]

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.row[1] = query[0, 0, 0, 0] != 0
            return super().forward(query, key, value)

    module, reference = Aliased(), Aliased()
    compiled = Compiled(module)
    assert_dense(compiled, reference, *tokens())
    assert compiled.said == [str(Unproved.MUTATED)]


def test_a_mask_made_in_inference_mode_is_not_read() -> None:
    with torch.inference_mode():
        module = Kept(CAUSAL)
    compiled = Compiled(module)
    with torch.inference_mode():
        assert_dense(compiled, module, *tokens())
        assert compiled.said == [str(Unproved.UNCOUNTED)]
        module.mask[:, 60:] = False
        assert_dense(compiled, module, *tokens())


def test_a_buffer_is_read_where_a_model_runs_in_inference_mode() -> None:
    module = Kept(CAUSAL)
    compiled = Compiled(module)
    with torch.inference_mode():
        for _ in range(2):
            assert_dense(compiled, module, *tokens())
    assert compiled.said == ["causal"]


def test_a_dense_call_reads_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(tensor: Tensor) -> None:
        raise AssertionError("a mask was read")

    monkeypatch.setattr("unisparse_flex.passes.masks.given.entries_of", read)
    config = SparseConfig(selector=ALL, min_length=LENGTH + 1)
    module = Kept(CAUSAL)
    compiled = Compiled(module, config)
    assert_dense(compiled, module, *tokens())
    proved = Compiled(lambda q, k, v: Handed()(q, k, v, torch.ones(128, 128).tril() > 0))
    proved(*tokens())
    assert proved.said == ["causal"]


def test_an_exported_program_keeps_the_mask_as_a_tensor() -> None:
    program = torch.export.export(Kept(CAUSAL), tokens())
    report = rewrite_sdpa(program, EVERYTHING)
    assert list(report.unproved.values()) == [Unproved.PAIRS]


@given(mask=masks(), inverted=st.booleans(), additive=st.booleans())
def test_tables_and_entries_say_the_pairs(mask: Tensor, inverted: bool, additive: bool) -> None:
    contents = read_mask(mask, q_len=mask.shape[2], kv_len=mask.shape[3])
    if contents is not None:
        seen = mask[:, 0] if mask.stride(0) and mask.shape[0] > 1 else mask[0, 0]
        number = contents.number if contents.in_window else None
        for name, tensor in zip(contents.tables, contents.tensors, strict=True):
            table = mask_table(seen, name, causal_offset=contents.causal_offset, number=number)
            assert table.equal(tensor)
    given_mask = ~mask if inverted else mask
    if additive:
        given_mask = torch.zeros(mask.shape).masked_fill(~given_mask, -torch.inf)
    entries = read_entries(given_mask)
    if entries is not None:
        assert isinstance(entries, PairEntries)
        assert pairs_of(entries, given_mask).equal(given_mask == entries.shown)
    elif contents is not None:
        raise AssertionError("what is read of a mask is not read of its entries")


@given(first=masks(), second=masks())
def test_a_formula_that_covers_other_entries_says_their_pairs(
    first: Tensor, second: Tensor
) -> None:
    made_for, found = read_entries(first), read_entries(second)
    if made_for is None or found is None or not made_for.covers(found):
        return
    assert isinstance(made_for, PairEntries)
    # Graphs are guarded by shapes, too.
    if made_for.along is None or first.shape[0] == second.shape[0]:
        assert pairs_of(made_for, second).equal(second == made_for.shown)


def pairs_of(entries: PairEntries, tensor: Tensor) -> Tensor:
    """What a formula made for entries shows of a tensor [B, 1, Sq, Skv]."""
    shown = torch.ones_like(tensor, dtype=torch.bool)
    row, key = torch.arange(tensor.shape[-2])[:, None], torch.arange(tensor.shape[-1])
    if entries.causal_offset is not None:
        shown &= key <= row + entries.causal_offset
    if entries.after is not None:
        shown &= key > row + entries.after
    kept = tensor[:, 0] if entries.along == 0 else tensor[:1, 0]
    for name in entries.tables:
        table = mask_table(
            kept == entries.shown,
            name,
            causal_offset=entries.causal_offset,
            number=entries.after,
        )
        part = {
            "last": lambda end: key <= end[..., None],
            "first": lambda end: end[..., None] <= key,
            "sees": lambda sees: sees[..., None],
            "valid": lambda valid: valid[..., None, :],
        }[name](table)
        shown &= part[:, None]
    return shown


@pytest.mark.slow
def test_a_graph_that_a_cache_has_is_guarded_like_one_that_is_compiled(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    inputs = tokens()
    for change in (None, 40, 60):
        torch._dynamo.reset()
        counters.clear()
        module = optimize(Kept(CAUSAL), ALL, min_length=0)
        run = torch.compile(module, fullgraph=True)
        for mask in [CAUSAL] if change is None else [CAUSAL, window(change), CAUSAL]:
            module.mask.copy_(mask)
            with torch.no_grad():
                output = run(*inputs)
            mask = mask[:128, :128]
            query, key, value = inputs
            expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        hits = counters["aot_autograd"]["autograd_cache_hit"]
        assert (hits > 0) is (change is not None)
