"""Random calls: each returns what attention over its blocks is, or raises a documented error.

`python -m tests.robustness.fuzz` runs as many as it is told to.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from unisparse_flex import UniSparse

from .case_strategies import cases
from .cases import Case
from .entries import check_attention, check_block_mask, check_optimize, check_select
from .fuzz import ALL
from .ways import check_branch, check_checkpointed, check_exported, check_patched

few = settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several, far slower where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


PLAIN = Case(
    batch=1,
    kv_heads=1,
    group=2,
    q_len=50,
    kv_len=50,
    head_dim=8,
    value_dim=8,
    dtype=torch.float32,
    contents=("normal", "normal", "normal"),
    layouts=("contiguous", "contiguous", "contiguous"),
    sharing="none",
    mask=None,
    is_causal=True,
    causal_lower_right=False,
    scale=None,
    selector=UniSparse(block_size=16, c_q=4, c_k=4, top_k=1),
    fault=None,
    seed=0,
)


@pytest.mark.parametrize("entry", ALL)
def test_an_ordinary_call_is_computed_and_not_left_out(entry: str) -> None:
    assert ALL[entry](PLAIN) == "computed"


@few
@given(cases())
def test_attention_is_that_of_its_blocks_or_says_what_is_wrong(case: Case) -> None:
    assert check_attention(case)


@few
@given(cases())
def test_a_selection_holds_what_every_row_needs_or_says_what_is_wrong(case: Case) -> None:
    assert check_select(case)


@few
@given(cases())
def test_a_block_mask_is_its_selection_or_says_what_is_wrong(case: Case) -> None:
    assert check_block_mask(case)


@few
@given(cases())
def test_an_optimized_call_is_that_of_its_blocks_or_what_sdpa_does(case: Case) -> None:
    assert check_optimize(case)


@few
@given(cases())
def test_a_patched_call_is_the_call_that_the_patch_makes(case: Case) -> None:
    assert check_patched(case)


@few
@given(cases())
def test_a_checkpointed_call_has_the_gradients_of_the_call(case: Case) -> None:
    assert check_checkpointed(case)


traced = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@traced
@given(cases())
def test_a_call_in_a_body_is_the_call(case: Case) -> None:
    assert check_branch(case)


@traced
@given(cases())
def test_a_call_exported_for_a_range_is_the_call(case: Case) -> None:
    assert check_exported(case)
