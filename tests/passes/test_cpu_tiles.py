"""Wide tiles in torch's CPU kernel of FlexAttention: which, where, and that the output stays."""

from __future__ import annotations

import re
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch._inductor import compile_fx  # noqa: F401  The template's module cannot come first.
from torch._inductor.utils import fresh_cache, run_and_get_code

from unisparse_flex import UniSparse, attention
from unisparse_flex.passes.attend import cpu_tiles

torch_template: Any = import_module(cpu_tiles.TEMPLATE_MODULE)


@pytest.mark.parametrize(
    ("head_dim", "rows"),
    [
        *(
            (16, 8),
            (64, 8),
            (80, 8),
            (128, 8),
            (176, 8),
            (192, 12),
            (256, 12),
            (288, 16),
            (368, 16),
        ),
        *((8, None), (72, None), (384, None), (512, None)),
    ],
)
def test_a_tile_has_the_rows_for_which_the_template_transposes_keys(
    head_dim: int, rows: int | None
) -> None:
    assert cpu_tiles.tile_rows(head_dim) == rows
    assert rows is None or 24 * rows > head_dim


@pytest.mark.parametrize(("head_dim", "rows"), [(32, 8), (192, 12)])
def test_compiled_calls_have_these_tiles_and_the_same_output(head_dim: int, rows: int) -> None:
    torch.manual_seed(0)
    # 131 rows: a last block of three, which no tile divides.
    query = torch.randn(1, 4, 131, head_dim)
    key, value = torch.randn(2, 1, 2, 131, head_dim).unbind()
    selector = UniSparse(block_size=32, top_p=1.0)

    def attend(query: Any, key: Any, value: Any) -> Any:
        return attention(query, key, value, is_causal=True, enable_gqa=True, selector=selector)

    with fresh_cache(), torch.no_grad():
        torch._dynamo.reset()
        output, [code] = run_and_get_code(torch.compile(attend), query, key, value)
    found = set(re.findall(r"transpose_b_kernel<(\d+), 16, \w+, \w+>\(\n", code))
    assert max(map(int, found)) == rows
    exact = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> type:
    """The template as torch has it, whatever was compiled before."""
    cls: type[Any] = torch_template.CppFlexAttentionTemplate
    own = getattr(cls.micro_gemm_define, "__wrapped__", cls.micro_gemm_define)
    monkeypatch.setattr(cls, "micro_gemm_define", own)
    return cls


def test_the_module_is_left_as_it_was_after_each_kernel(
    template: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def define(self: Any, kernel_name: str) -> str:
        seen.append((torch_template.GemmBlocking(1, 16, 1), torch_template.GemmBlocking(2, 16, 1)))
        if kernel_name == "wrong":
            raise RuntimeError(kernel_name)
        return kernel_name

    blocking = torch_template.GemmBlocking
    monkeypatch.setattr(template, "micro_gemm_define", define)
    assert cpu_tiles.widen_tiles.__wrapped__()
    query = SimpleNamespace(get_size=lambda: [1, 4, 131, sympy.Integer(64)])
    kernel: Any = SimpleNamespace(input_nodes=[query])
    wide: Any = template
    assert wide.micro_gemm_define(kernel, "kernel") == "kernel"
    with pytest.raises(RuntimeError, match="wrong"):
        wide.micro_gemm_define(kernel, "wrong")
    # Tiles that torch chose wider itself stay.
    assert seen == [(blocking(8, 16, 1), blocking(2, 16, 1))] * 2
    query.get_size = lambda: [1, 4, 131, sympy.Symbol("s0")]
    wide.micro_gemm_define(kernel, "symbolic")
    assert seen[-1][0] == blocking(1, 16, 1)
    assert torch_template.GemmBlocking is blocking


@pytest.mark.parametrize("gone", ["CppFlexAttentionTemplate", "GemmBlocking"])
def test_a_torch_without_the_template_is_left_alone(
    template: type, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = template.__dict__["micro_gemm_define"]
    monkeypatch.delattr(torch_template, gone)
    assert not cpu_tiles.widen_tiles.__wrapped__()
    assert template.__dict__["micro_gemm_define"] is own


def test_a_torch_without_the_module_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_tiles, "TEMPLATE_MODULE", "torch._inductor.codegen.no_such_template")
    assert not cpu_tiles.widen_tiles.__wrapped__()
