"""Wider tiles for the product of queries and keys in torch's CPU kernel of FlexAttention.

Where the kernel does not pack its operands (float32, and bfloat16 on CPUs without instructions for
it) torch computes one row of queries at a time, each number of a key is loaded anew for every row,
and this product takes most of the kernel's time. Given several rows, the same template transposes
the keys in registers, once for all of them.
"""

from __future__ import annotations

from functools import cache, wraps
from importlib import import_module
from typing import Any

import sympy

TEMPLATE_MODULE = "torch._inductor.codegen.cpp_flex_attention_template"
LEAST_ROWS = 8
# More take longer to compile: the template writes a function for every number of rows left over.
MOST_ROWS = 16
# Numbers in the widest vector that the template has.
LANES = 16


def tile_rows(head_dim: int) -> int | None:
    """Rows of a tile, by the template's condition for transposing keys; ``None`` leaves its own."""
    rows = max(LEAST_ROWS, -(-(head_dim // 24 + 1) // 4) * 4)
    return rows if head_dim % LANES == 0 and rows <= MOST_ROWS else None


@cache
def widen_tiles() -> bool:
    """Has kernels that are compiled from now on use `tile_rows`; says whether torch let it.

    Of a torch that computes this otherwise nothing is changed. Kernels differ by rounding: sums are
    taken in another order.
    """
    try:
        # Of the two modules the template's cannot be imported first.
        import_module("torch._inductor.compile_fx")
        module: Any = import_module(TEMPLATE_MODULE)
        template = module.CppFlexAttentionTemplate
        define, blocking = template.micro_gemm_define, module.GemmBlocking
    except (ImportError, AttributeError):
        return False

    @wraps(define)
    def define_wide(self: Any, kernel_name: str) -> Any:
        head_dim = self.input_nodes[0].get_size()[-1]
        is_known = isinstance(head_dim, int | sympy.Integer)
        rows = tile_rows(int(head_dim)) if is_known else None

        def widened(block_m: int, block_n: int, block_k: int) -> Any:
            return blocking(rows if rows and block_m == 1 else block_m, block_n, block_k)

        module.GemmBlocking = widened
        try:
            return define(self, kernel_name)
        finally:
            module.GemmBlocking = blocking

    template.micro_gemm_define = define_wide
    return True
