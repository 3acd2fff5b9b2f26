"""Adapters for packages of other work give each its layout, its scale and its settings.

The real packages need a GPU; what stands for them here has the signatures of their sources
(`rival_packages`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unisparse_flex.evaluation import RIVALS, load_rival, rival_attention, rivals
from unisparse_flex.selectors import DEFAULT_SELECTOR

from .rival_packages import SOURCES, write_packages

HEADS, KV_HEADS, LENGTH, DIM = 6, 2, 300, 32


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The packages, importable while a test runs."""
    write_packages(tmp_path)
    names = {name.partition("/")[0].removesuffix(".py") for name in SOURCES}

    def forget() -> None:
        for module in [m for m in sys.modules if m.partition(".")[0] in names]:
            del sys.modules[module]

    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    forget()


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    """Tensors as a model has them: heads and tokens swapped in memory."""
    torch.manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, LENGTH, heads, DIM).transpose(1, 2) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float, **mask: Any) -> Tensor:
    kinds: dict[str, Any] = mask or {"is_causal": True}
    return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True, **kinds)


@pytest.mark.parametrize("scale", [DIM**-0.5, 0.3])
@pytest.mark.parametrize("name", [name for name in RIVALS if name != "flashinfer"])
def test_a_package_gets_its_layout_and_the_scale(packages: Path, name: str, scale: float) -> None:
    out = load_rival(name).call(*qkv(), scale)
    torch.testing.assert_close(out, dense(*qkv(), scale), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [DIM**-0.5, 0.3])
def test_flashinfer_attends_to_the_default_selectors_blocks(packages: Path, scale: float) -> None:
    query, key, value = qkv()
    keep = DEFAULT_SELECTOR.select(query, key, is_causal=True, scale=scale).keep
    size = DEFAULT_SELECTOR.block_size
    pairs = keep.repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :LENGTH, :LENGTH].tril()
    out = load_rival("flashinfer").call(query, key, value, scale)
    expected = dense(query, key, value, scale, attn_mask=pairs)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="one prompt, got a batch of 2"):
        load_rival("flashinfer").call(query.expand(2, -1, -1, -1), key, value, scale)


@pytest.mark.parametrize(("vertical", "slash"), [(3, 5), (40, 7), (10**4, 10**4)])
def test_columns_and_diagonals_are_those_of_the_last_queries(vertical: int, slash: int) -> None:
    query, key, _ = qkv()
    key = rivals.repeat_heads(query, key)
    settings = {"last_q": 64, "forced_columns": 4, "forced_diagonals": 6}
    columns, diagonals = rivals._vertical_slash(
        query, key, vertical_size=vertical, slash_size=slash, **settings
    )
    shares = (
        (query @ key.mT * DIM**-0.5)
        .masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
        .softmax(-1)
    )
    for head in range(HEADS):
        by_column = [torch.inf] * LENGTH
        by_distance = [torch.inf] * LENGTH
        last = range(LENGTH - 64, LENGTH)
        for j in range(4, LENGTH):
            by_column[j] = sum(float(shares[0, head, i, j]) for i in last)
        for distance in range(6, LENGTH):
            seen = [i for i in last if i >= distance]
            by_distance[distance] = sum(float(shares[0, head, i, i - distance]) for i in seen)
        for found, mass, count, forced in (
            (columns, by_column, vertical, 4),
            (diagonals, by_distance, slash, 6),
        ):
            kept = found[0, head].tolist()
            assert len(kept) == len(set(kept)) == min(LENGTH, max(count, forced))
            least = min(mass[i] for i in kept)
            dropped = [mass[i] for i in range(LENGTH) if i not in kept]
            assert max(dropped, default=0.0) <= least + 1e-5


def test_settings_and_versions_are_recorded(packages: Path) -> None:
    assert load_rival("minference").version == "0.1.6"
    assert load_rival("flex_prefill").version is None
    assert load_rival("flex_prefill").settings == {
        "gamma": 0.9,
        "tau": 0.1,
        "min_budget": 1024,
        "block_size": 128,
    }
    # What is left to the function is its own.
    assert load_rival("spas_sage_attn").settings == {
        "tensor_layout": "HND",
        "topk": 0.35,
        "simthreshd1": -0.1,
        "pvthreshd": 50,
        "smooth_k": True,
    }


@pytest.mark.parametrize("name", RIVALS)
def test_what_is_not_there_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "find_spec", lambda module: None)
    with pytest.raises(ImportError, match=f"{name} must have one of .*; install it"):
        load_rival(name)


def test_what_a_package_itself_lacks_is_said(packages: Path) -> None:
    source = packages / "xattn" / "src" / "Xattention.py"
    source.write_text("from block_sparse_attn import block_sparse_attn_func\n")
    with pytest.raises(ModuleNotFoundError, match="block_sparse_attn"):
        load_rival("xattn")


def test_flash_prefill_is_found_in_its_repository_too(packages: Path) -> None:
    """There it is a folder called ops."""
    (packages / "ops").mkdir()
    (packages / "ops" / "__init__.py").touch()
    moved = packages / "flash_prefill" / "__init__.py"
    moved.rename(packages / "ops" / "flashprefill_native_forward.py")
    (packages / "flash_prefill").rmdir()
    out = load_rival("flash_prefill").call(*qkv(), 0.3)
    torch.testing.assert_close(out, dense(*qkv(), 0.3), atol=1e-5, rtol=1e-5)
    del sys.modules["ops.flashprefill_native_forward"], sys.modules["ops"]


def test_an_error_is_that_of_the_output(packages: Path) -> None:
    rival = load_rival("flex_prefill")
    off = replace(rival, call=lambda q, k, v, scale: 1.25 * rival.call(q, k, v, scale))
    for one, error in ((rival, 0.0), (off, 0.25)):
        rival_attention._loaded[one.name] = one
        with rival_attention.judged(one) as errors:
            torch.ops.unisparse_evaluation.rival(*qkv(), 0.3, one.name)
        assert errors == pytest.approx([error], abs=1e-5)


def test_the_operator(packages: Path) -> None:
    rival_attention._loaded["xattn"] = load_rival("xattn")
    found = torch.library.opcheck(
        torch.ops.unisparse_evaluation.rival.default,
        (*qkv(), 0.3, "xattn"),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(found.values()) == {"SUCCESS"}


def test_what_a_package_prints_is_kept_from_standard_output(
    packages: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rival_attention._loaded["xattn"] = load_rival("xattn")
    torch.ops.unisparse_evaluation.rival(*qkv(), 0.3, "xattn")
    assert capsys.readouterr().out == ""
    load_rival("xattn").call(*qkv(), 0.3)
    assert capsys.readouterr().out.startswith("approximated")


def test_an_output_in_another_layout_is_refused(packages: Path) -> None:
    rival = load_rival("xattn")
    rival_attention._loaded["xattn"] = replace(
        rival, call=lambda *arguments: rival.call(*arguments).transpose(1, 2)
    )
    with pytest.raises(ValueError, match=r"xattn must return \[B, H, S, D\] \(1, 6, 300, 32\)"):
        torch.ops.unisparse_evaluation.rival(*qkv(), 0.3, "xattn")
