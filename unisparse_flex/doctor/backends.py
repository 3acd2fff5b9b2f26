"""The device, the kernel that attends on it, and whether the selection kernels run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import torch

from ..block_masks import DEFAULT_SELECTOR, BlockGeometry, kernels
from ..counted import counted
from ..passes.calls import SdpaCall
from ..passes.decision import (
    FLASH_CAPABILITY,
    USUAL_DTYPES,
    break_even_length,
    find_rates,
    flash_obstacle,
    flex_lowers,
    hardware_name,
    is_flash_installed,
    keep_rates,
)
from .finding import Finding, Status
from .rate_measure import call_shape, measure_rates

CXX_COMPILERS = ("g++", "clang++", "c++", "cl")
# What a large language model's attention is: 16-bit on CUDA, head_dim 128.
HEAD_DIM = 128
# Query heads, key heads, head_dim of Llama-3.1-8B.
LLAMA_HEADS = (32, 8, HEAD_DIM)


def default_device() -> torch.device:
    """The first CUDA device if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, float32 on the CPU."""
    return USUAL_DTYPES[device.type]


def check_device(device: torch.device) -> Finding:
    """The device in words, and whether the cost model has rates of its own for it."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        words = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    else:
        threads = counted(torch.get_num_threads(), "thread")
        words = f"CPU, {torch.backends.cpu.get_cpu_capability()}, {threads}"
    found = find_rates(device, default_dtype(device))
    if found.note:
        detail = f"{words}; {found.note}"
        return Finding(name="device", status=Status.NOTE, detail=detail, fix=found.way_out)
    return Finding(name="device", status=Status.OK, detail=words)


def measure_device(device: torch.device, show: Callable[[str], None]) -> Finding:
    """Measures the device's rates and keeps them for the cost model."""
    rates = measure_rates(device, default_dtype(device), show)
    index = device.index or 0
    try:
        path = keep_rates(rates, hardware_name(device.type, index))
    except OSError as error:
        return Finding(
            name="rates",
            status=Status.PROBLEM,
            detail=f"measured, but not kept: {error}",
            fix="name a folder that can be written in the environment variable XDG_CACHE_HOME",
        )
    shape = call_shape(LLAMA_HEADS, 0, default_dtype(device), device)
    length = break_even_length(shape, DEFAULT_SELECTOR, self_attention=True)
    begins = "at no length" if length is None else f"from {length} tokens on"
    detail = f"measured: Llama-3.1-8B's heads are sparse {begins}; kept in {path}"
    return Finding(name="rates", status=Status.OK, detail=detail)


def check_backend(device: torch.device) -> Finding:
    """Which kernel would attend to the kept blocks, and why not a faster one."""
    call = _typical_call(device)
    block_size = DEFAULT_SELECTOR.block_size
    if device.type == "cuda":
        obstacle = flash_obstacle(call, block_size)
        if obstacle is None:
            detail = "FlashAttention-4 over blocks, through FlexAttention"
            return Finding(name="backend", status=Status.OK, detail=detail)
        if not flex_lowers(call):
            return Finding(
                name="backend",
                status=Status.PROBLEM,
                detail="FlexAttention has no kernel for this device: calls stay dense",
                fix="install a torch that is built for this device",
            )
        major, _ = torch.cuda.get_device_capability(device)
        can_have_flash = major == FLASH_CAPABILITY and not is_flash_installed()
        return Finding(
            name="backend",
            status=Status.NOTE if can_have_flash else Status.OK,
            detail=f"FlexAttention's Triton kernel; not FlashAttention-4: {obstacle}",
            fix="pip install --pre flash-attn-4" if can_have_flash else "",
        )
    if flex_lowers(call):
        return Finding(
            name="backend",
            status=Status.OK,
            detail="FlexAttention's CPU kernel, by Inductor; not Triton or FlashAttention-4: "
            f"no CUDA device ({_why_no_cuda()})",
        )
    return Finding(
        name="backend",
        status=Status.PROBLEM,
        detail="the CPU kernel of FlexAttention needs AVX2, not found here: calls stay dense",
        fix="use a machine with AVX2 or a CUDA device",
    )


def check_selection_kernels(device: torch.device) -> Finding:
    """Whether blocks are scored and selected by the Triton kernels."""
    name = "selection kernels"
    if device.type != "cuda":
        return Finding(
            name=name,
            status=Status.OK,
            detail="plain PyTorch scores and selects; not the Triton kernels: they need a CUDA "
            f"device, got {device}",
        )
    obstacle = _kernels_obstacle(device)
    if obstacle is None:
        detail = "Triton scores and selects"
        capability = torch.cuda.get_device_capability(device)
        if capability not in kernels.MEASURED:
            detail += "; not measured on this kind of GPU, where it agrees with plain PyTorch"
        return Finding(name=name, status=Status.OK, detail=detail)
    return Finding(
        name=name,
        status=Status.NOTE,
        detail=f"plain PyTorch scores and selects; not the Triton kernels: {obstacle}",
        fix="pip install triton" if "triton is" in obstacle else "",
    )


def check_compiler(device: torch.device) -> Finding | None:
    """Whether there is the C++ compiler that Inductor needs on the CPU; ``None`` on CUDA."""
    if device.type != "cpu":
        return None
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *CXX_COMPILERS))), None)
    if found is None:
        return Finding(
            name="C++ compiler",
            status=Status.PROBLEM,
            detail=f"none of {', '.join(CXX_COMPILERS)} found: torch.compile fails on the CPU",
            fix="apt-get install g++, or name a compiler in the environment variable CXX",
        )
    return Finding(name="C++ compiler", status=Status.OK, detail=found)


def _typical_call(device: torch.device) -> SdpaCall:
    """A causal call as large language models make it, with few tokens."""
    size = (1, 1, DEFAULT_SELECTOR.block_size, HEAD_DIM)
    query, key, value = torch.zeros((3, *size), dtype=default_dtype(device), device=device)
    return SdpaCall(query=query, key=key, value=value, is_causal=True)


def _kernels_obstacle(device: torch.device) -> str | None:
    call = _typical_call(device)
    length = call.query.shape[2]
    geometry = BlockGeometry(
        q_len=length, kv_len=length, block_size=DEFAULT_SELECTOR.block_size, causal_offset=0
    )
    return kernels.obstacle(call.query, call.key, geometry, scale=1.0)


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "no GPU or no driver"
