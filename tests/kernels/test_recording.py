"""A call that is repeated from its recording is the call itself."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisparse_flex.block_masks.block_lists import BlockLists
from unisparse_flex.block_masks.kernels import operator, settings_of
from unisparse_flex.block_masks.kernels.recording import (
    PLACE,
    Recording,
    Recordings,
    empty,
    recorder_in_force,
)
from unisparse_flex.block_masks.kernels.settings import encode_settings

from .calls import KernelCall, assert_same_lists, fixed_call, kernel_calls, run
from .interpreter import Kernels
from .test_intervals import masked_calls


@pytest.fixture(scope="module")
def interpreted_operator(kernels: Kernels) -> Iterator[None]:
    """The operator's own function runs the interpreted kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, f"{operator.__package__}.lists", kernels.lists)
        yield


def select(
    call: KernelCall, query: Tensor, key: Tensor, intervals: list[Tensor] | None = None
) -> BlockLists:
    offset = call.geometry.causal_offset
    return BlockLists(
        *operator._run(
            query,
            key,
            call.head_dim**-0.5,
            encode_settings(*settings_of(call.selector)),
            offset,
            intervals=intervals,
        )
    )


class Counted(Recordings):
    """Counts how often something was computed, not repeated."""

    def __init__(self, most: int = 256) -> None:
        super().__init__(most)
        self.computed = 0

    def run(self, kind: Any, inputs: Any, compute: Any) -> Any:
        def count() -> Any:
            self.computed += 1
            return compute()

        return super().run(kind, inputs, count)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(operator, "_recordings", counted)
    return counted


@settings(max_examples=3)
@given(data=st.data())
@pytest.mark.usefixtures("interpreted_operator")
def test_a_repeated_call_selects_what_the_kernels_do(kernels: Kernels, data: st.DataObject) -> None:
    call = data.draw(kernel_calls(rule="top_k"))
    query, key = call.query_key()
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted()
        patch.setattr(operator, "_recordings", counted)
        select(call, query.flip(0, 2), key.flip(2).contiguous())
        assert_same_lists(select(call, query, key), run(kernels, call, query, key))
        assert counted.computed == 1


@pytest.mark.parametrize("top_p", [None, 0.3])
@pytest.mark.usefixtures("interpreted_operator")
def test_a_repeated_call_reads_the_thresholds_of_its_heads(
    kernels: Kernels, recordings: Counted, top_p: float | None
) -> None:
    for thresholds in ((0.4, 0.0), (0.01, 0.2)):
        call = fixed_call(90, sampled_queries=2, top_p=top_p, head_thresholds=thresholds)
        query, key = call.query_key()
        select(call, query + 1, key - 1)
        assert_same_lists(select(call, query, key), run(kernels, call, query, key))
    assert recordings.computed == 2


@settings(max_examples=3)
@given(data=st.data())
@pytest.mark.usefixtures("interpreted_operator")
def test_a_repeated_call_reads_its_own_mask(kernels: Kernels, data: st.DataObject) -> None:
    masked = data.draw(masked_calls(rule="top_k"))
    query, key = masked.call.query_key()
    tables = masked.tables()
    other = replace(masked, tensors=tuple(tensor.flip(-1) for tensor in masked.tensors))
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted()
        patch.setattr(operator, "_recordings", counted)
        select(masked.call, query, key, other.tables().tensors())
        found = select(masked.call, query, key, tables.tensors())
        assert_same_lists(found, run(kernels, masked.call, query, key, intervals=tables))
        assert counted.computed == 1


@pytest.mark.usefixtures("interpreted_operator")
def test_a_call_in_several_turns_is_repeated(
    kernels: Kernels, recordings: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.lists, "SCRATCH_BYTES", 1024)
    call = fixed_call(90, top_k=3, kv_heads=2, sampled_queries=4)
    query, key = call.query_key()
    select(call, query + 1, key - 1)
    (recording,) = recordings._found.values()
    assert isinstance(recording, Recording)
    # Two to pool, and two to score and one to select in each turn.
    assert len(recording.launches) > 2 + 3
    assert_same_lists(select(call, query, key), run(kernels, call, query, key))
    assert recordings.computed == 1


@given(data=st.data())
def test_scratch_is_shared_by_what_is_not_in_use_at_the_same_time(data: st.DataObject) -> None:
    """Each launch adds tensors to a new one, of which some are read much later."""
    sources = data.draw(
        st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1, max_size=12)
    )
    sizes = data.draw(st.lists(st.integers(1, 300), min_size=len(sources), max_size=len(sources)))

    def add(target: Tensor, *others: Tensor) -> None:
        target.copy_(target.new_tensor([float(other.sum()) for other in others]).sum() + 1)

    def compute(first: Tensor) -> list[Tensor]:
        made = [first]
        for choice, size in zip(sources, sizes, strict=True):
            target = empty(first, (size,))
            arguments = [target, *(made[i % len(made)] for i in choice)]
            add(*arguments)
            recorder = recorder_in_force()
            if recorder is not None:
                recorder.launched(add, arguments)
            made.append(target)
        return made[-1:]

    recordings = Counted()
    for first in (torch.ones(3), torch.arange(3.0)):
        (found,) = recordings.run("kind", [first], partial(compute, first))
        assert found.equal(compute(first)[0])
    (recording,) = recordings._found.values()
    assert recordings.computed == 1
    assert _scratch_of(recording) <= sum(-(-4 * size // PLACE) * PLACE for size in sizes[:-1])


def _scratch_of(recording: Recording) -> int:
    """Bytes of scratch."""
    return sum(shape[0] for shape, _, _ in recording.outputs[recording.returned :])


def test_a_chain_needs_the_scratch_of_two_links() -> None:
    recordings = Recordings()

    def compute(first: Tensor) -> list[Tensor]:
        for _ in range(5):
            second = empty(first, (PLACE,))
            recorder = recorder_in_force()
            assert recorder is not None
            recorder.launched(Tensor.copy_, [second, first])
            first = second
        return [first]

    ones = torch.ones(PLACE)
    recordings.run("kind", [ones], partial(compute, ones))
    (recording,) = recordings._found.values()
    assert _scratch_of(recording) == 2 * 4 * PLACE
    (output,) = recordings.run("kind", [torch.arange(float(PLACE))], list)
    assert output.equal(torch.arange(float(PLACE)))


WHOLE = torch.arange(48.0)


@pytest.mark.parametrize(
    "other",
    [
        WHOLE[:24].view(4, 6),
        WHOLE[:24].view(6, 4).mT.contiguous().mT,
        WHOLE.view(12, 4)[::2],
        WHOLE[1:25].view(6, 4),
        torch.arange(24).view(6, 4),
        None,
    ],
    ids=["shape", "strides", "strides of a part", "alignment", "dtype", "settings"],
)
def test_another_kind_of_call_is_another_recording(other: Tensor | None) -> None:
    recordings, counted = Recordings(), []

    def run(kind: str, given: Tensor) -> None:
        def compute() -> list[Tensor]:
            counted.append(kind)
            return [empty(given, (4,))]

        recordings.run(kind, [given], compute)

    first = WHOLE[:24].view(6, 4)
    run("kind", first)
    run("kind", first.clone())
    assert len(counted) == 1
    run("other", first) if other is None else run("kind", other)
    assert len(counted) == 2


@pytest.mark.usefixtures("interpreted_operator")
def test_a_call_that_copies_its_keys_is_never_repeated(
    kernels: Kernels, recordings: Counted
) -> None:
    call = fixed_call(100, top_k=3)
    query, key = call.query_key()
    for shift in (1.0, 0.0):
        strided = (key + shift).mT.contiguous().mT
        expected = run(kernels, call, query, (key + shift).contiguous())
        assert_same_lists(select(call, query, strided), expected)
    assert recordings.computed == 2


@pytest.mark.usefixtures("interpreted_operator")
def test_queries_that_begin_where_keys_do_are_of_a_kind_of_their_own(
    kernels: Kernels, recordings: Counted
) -> None:
    call = fixed_call(100, top_k=3, group=2)
    query, key = call.query_key()
    # Of the same shape, strides and alignment as the keys.
    part = query[:, : key.shape[1]]
    for own in (part, key, part + 1):
        select(call, query, own)
    assert recordings.computed == 2
    other = query.flip(2).contiguous()
    assert_same_lists(
        select(call, other, other[:, : key.shape[1]]),
        run(kernels, call, other, other[:, : key.shape[1]].clone()),
    )
    assert_same_lists(select(call, query, key), run(kernels, call, query, key))
    assert recordings.computed == 2


def test_recordings_keep_no_tensor_and_are_not_more_than_told() -> None:
    recordings = Recordings(most=2)

    def compute(like: Tensor) -> list[Tensor]:
        return [empty(like, (4,))]

    alive = []
    for length in (1, 2, 3):
        given = torch.zeros(length)
        alive.append(weakref.ref(given))
        recordings.run("kind", [given], lambda given=given: compute(given))  # type: ignore[misc]
    del given
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3
    found = recordings._found.values()
    assert len(found) == 2
    assert all(isinstance(recording, Recording) for recording in found)


def test_a_call_that_fails_leaves_no_recorder() -> None:
    recordings = Recordings()

    def fail() -> list[Tensor]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        recordings.run("kind", [torch.zeros(1)], fail)
    assert not recordings._found
    output = recordings.run("kind", [torch.zeros(1)], lambda: [empty(torch.zeros(1), (2,))])
    assert output[0].shape == (2,)
