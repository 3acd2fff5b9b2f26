"""A cache that is read whole says why: the rule, and the number that it goes by."""

from __future__ import annotations

from typing import Any

import pytest

from unisparse_flex.integrations import transformers_decode, transformers_decode_device
from unisparse_flex.integrations.transformers import DecodeSelector, SparseStaticCache

from .generation import create, prompt

# Of a key and a value of one layer.
BYTES = 2 * 2 * 16 * 4


def after_tokens(model: Any, selector: DecodeSelector, *, length: int = 200) -> SparseStaticCache:
    """A cache of ``length`` tokens of a prompt and one that was generated and read."""
    cache = SparseStaticCache(model.config, length + 2, selector)
    assert cache.reason is None or "window" in cache.reason
    options: Any = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(prompt(length), **cache.as_argument, max_new_tokens=2, **options)
    return cache


def few(**settings: Any) -> DecodeSelector:
    return DecodeSelector(budget=64, unit=16, **settings)


def test_a_short_cache_on_a_cpu_names_the_size_from_which_a_part_is_faster(llama: Any) -> None:
    cache = after_tokens(llama, few(min_keys=0))
    assert cache.density == 1.0
    # 6e6 bytes for the choice, 2.5 for each byte of a tenth.
    assert cache.reason == (
        f"2 of 2 layers read whole: {201 * BYTES / 1e6:.1f} MB of keys and values each, and on a "
        "CPU reading 10% of them is faster from 8.0 MB on"
    )


def test_a_cache_at_that_size_is_read_in_part(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_decode, "CHOICE_BYTES", 0.74 * 201 * BYTES)
    cache = after_tokens(llama, few(min_keys=0))
    assert cache.density is not None
    assert cache.density < 1.0
    monkeypatch.setattr(transformers_decode, "CHOICE_BYTES", 0.76 * 201 * BYTES)
    assert after_tokens(llama, few(min_keys=0)).density == 1.0


def test_what_is_chosen_nearly_whole_says_so(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_decode, "CHOICE_BYTES", 0)
    cache = after_tokens(llama, DecodeSelector(share=0.9, min_keys=0, unit=16))
    assert cache.reason == (
        "2 of 2 layers read whole: 92% of the keys were chosen, and on a CPU reading a part is "
        "faster below 40% at best"
    )


def test_where_a_part_is_read_there_is_no_reason(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_decode, "CHOICE_BYTES", 0)
    monkeypatch.setattr(transformers_decode, "COPY", 0)
    assert after_tokens(llama, few(min_keys=0)).reason is None
    short = after_tokens(llama, few(min_keys=201))
    assert short.density == 1.0
    assert short.reason == (
        "2 of 2 layers read whole: 201 keys each, and of min_keys=201 or fewer all are read"
    )


def test_windows_are_said_to_be_read_whole(llama: Any) -> None:
    cache = after_tokens(create("mistral", window=16), few(min_keys=0))
    assert cache.density is None
    assert cache.reason == "every layer has a sliding window, which is read whole"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU reads as a GPU does."""
    monkeypatch.setattr(transformers_decode, "DEVICES", ("cpu", "cuda"))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("selector", "most", "reason"),
    [
        (
            few(min_keys=0),
            32 * 2**20,
            "0.1 MiB of keys and values each, and on a GPU those of 32 MiB or less are read whole",
        ),
        (
            few(min_keys=208),
            0,
            "room for 208 keys each, and of min_keys=208 or fewer all are read",
        ),
        (few(min_keys=201), 0, "201 keys each, and of min_keys=201 or fewer all are read"),
        (few(min_keys=0), 0, None),
    ],
)
def test_a_gpu_goes_by_rules_of_its_own(
    llama: Any,
    monkeypatch: pytest.MonkeyPatch,
    selector: DecodeSelector,
    most: int,
    reason: str | None,
) -> None:
    monkeypatch.setattr(transformers_decode_device, "FEW_BYTES", most)
    cache = after_tokens(llama, selector)
    assert cache.density is not None
    assert (cache.density == 1.0) == (reason is not None)
    assert cache.reason == (reason and f"2 of 2 layers read whole: {reason}")
