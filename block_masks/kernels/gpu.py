"""What a GPU is to the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True)
class Gpu:
    """What tiles, and the way keys are read, follow from.

    Attributes:
        capability: Compute capability, for instance (9, 0); of AMD's, what torch calls so.
        is_amd: Whether HIP runs it.
        reads_tensor_maps: Whether a unit of its own copies tiles that a tensor map describes, as
            the tensor memory accelerator does from 9.0 on.
    """

    capability: tuple[int, int]
    is_amd: bool = False
    reads_tensor_maps: bool = False

    @classmethod
    def of_capability(cls, capability: tuple[int, int]) -> Gpu:
        """NVIDIA's GPU of a compute capability."""
        return cls(capability, reads_tensor_maps=capability >= (9, 0))

    @property
    def has_wide_products(self) -> bool:
        """Whether products are of four warps, from shared memory: Hopper, the B200's kin."""
        return not self.is_amd and self.capability[0] in (9, 10)


def starts_early(device: torch.device) -> bool:
    """Whether a kernel may be on the GPU before the one that it waits for is done."""
    gpu = gpu_of(device)
    # The interpreter does one after the other.
    return device.type != "cpu" and not gpu.is_amd and gpu.capability >= (9, 0)


def early_options(early: bool) -> dict[str, bool]:
    """What a kernel is launched with that may start early; not an option of every compiler."""
    return {"launch_pdl": True} if early else {}


def gpu_of(device: torch.device) -> Gpu:
    """The GPU that a device is; Hopper for what is none, where kernels are interpreted."""
    if device.type != "cuda":
        return Gpu.of_capability((9, 0))
    return _gpu_of(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _gpu_of(index: int) -> Gpu:
    capability = torch.cuda.get_device_capability(index)
    return Gpu(capability, is_amd=True) if torch.version.hip else Gpu.of_capability(capability)
