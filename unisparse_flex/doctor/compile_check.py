"""A small sparse call, compiled, against dense attention that is masked to the same blocks.

Symbols: B batch, H heads, S tokens, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_masks import UniSparse
from ..clock import timed
from ..functional import attention
from ..shares import say_share
from .backends import default_dtype
from .finding import Finding, Status

NAME = "compiled sparse call"
HEADS, BLOCKS, HEAD_DIM, BLOCK_SIZE = 2, 8, 64, 128
# A row keeps its diagonal, the first block and one that stands out: no rounding chooses otherwise.
SELECTOR = UniSparse(block_size=BLOCK_SIZE, c_q=8, c_k=8, top_p=None, top_k=2)
# Errors of the same precision without a kernel, times this, and a floor for errors of nothing.
TOLERANCE, FLOOR = 2.0, 1e-6
FIX = (
    "run with TORCHDYNAMO_VERBOSE=1 for the whole error; clear torch's cache "
    "(torch._inductor.utils.fresh_cache) if it comes from another machine; check torch, triton "
    "and the C++ compiler above"
)


def check_compiled_call(device: torch.device) -> Finding:
    """Compiles and runs one sparse call, and compares it with its oracle in float64."""
    query, key, value = create_inputs(device)

    def check() -> tuple[float, float, float]:
        output = torch.compile(_attend, fullgraph=True)(query, key, value)
        return compare(output, query, key, value)

    try:
        with torch.no_grad():
            (difference, allowed, density), seconds = timed(check, device)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Finding(
            name=NAME, status=Status.PROBLEM, detail=f"{type(error).__name__}: {first}", fix=FIX
        )
    numbers = f"rms difference {difference:.1e} from the dense masked oracle, allowed {allowed:.1e}"
    if not difference <= allowed:
        return Finding(
            name=NAME,
            status=Status.PROBLEM,
            detail=f"wrong numbers: {numbers}",
            fix="report it with the output of unisparse-flex doctor --json",
        )
    return Finding(
        name=NAME,
        status=Status.OK,
        detail=f"{numbers}; {say_share(density)} of the blocks, {seconds:.1f} s with compilation",
    )


def create_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Queries whose blocks each look for one key block; all [1, H, S, D]."""
    generator = torch.Generator().manual_seed(0)
    block = torch.arange(BLOCKS)
    directions = torch.eye(BLOCKS, HEAD_DIM)
    shape = (1, HEADS, BLOCKS * BLOCK_SIZE, HEAD_DIM)
    noise = torch.randn((3, *shape), generator=generator)
    key = directions.repeat_interleave(BLOCK_SIZE, dim=0) * 6.0 + 0.1 * noise[0]
    query = directions[block // 2].repeat_interleave(BLOCK_SIZE, dim=0) * 6.0 + 0.1 * noise[1]
    dtype = default_dtype(device)
    query, key, value = (tensor.to(device, dtype) for tensor in (query, key, noise[2]))
    return query, key, value


def compare(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[float, float, float]:
    """Compares an output with dense attention masked to the blocks that are selected.

    Args:
        output: [1, H, S, D].
        query: [1, H, S, D].
        key: [1, H, S, D].
        value: [1, H, S, D].

    Returns:
        Root mean square difference from the oracle in float64, how much is allowed, and density.
    """
    # On the CPU: the reference, whatever selects on the device.
    selection = SELECTOR.select(query.cpu().float(), key.cpu().float(), is_causal=True)
    mask = selection.token_mask().to(query.device)

    def oracle(dtype: torch.dtype) -> Tensor:
        output = F.scaled_dot_product_attention(
            query.to(dtype), key.to(dtype), value.to(dtype), attn_mask=mask
        )
        return output.double()

    exact = oracle(torch.float64)
    difference = float((output.double() - exact).square().mean().sqrt())
    rounding = float((oracle(query.dtype) - exact).square().mean().sqrt())
    return difference, TOLERANCE * rounding + FLOOR, selection.density()


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key, value, is_causal=True, selector=SELECTOR)
