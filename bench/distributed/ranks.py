"""Processes of one host that measure together, and what they have in common."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.multiprocessing.spawn import ProcessException, spawn

from ..timing import timed


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One of the processes.

    Attributes:
        index: Its number.
        count: Of all.
        device: ``"cuda"`` or ``"cpu"``; the current CUDA device is this rank's.
        mesh: All ranks in a row.
    """

    index: int
    count: int
    device: str
    mesh: DeviceMesh

    def seconds(self, function: Callable[[], Any]) -> float:
        """Seconds of the slowest rank.

        Raises:
            Exception: What ``function`` raised here; a RuntimeError where it did on other ranks
                alone. All ranks raise or none: one that left would meet the others in the wrong
                collective.
        """
        self.wait()
        failure, seconds = timed(lambda: _failure_of(function), torch.device(self.device))
        slowest = self.largest(seconds)
        first = self.first(failure is not None)
        if first is not None:
            raise failure or RuntimeError(f"rank {first} failed")
        return slowest

    def largest(self, number: float) -> float:
        """The greatest of what the ranks give."""
        found = torch.tensor(float(number), dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def total(self, number: float) -> float:
        """The sum of what the ranks give."""
        found = torch.tensor(float(number), dtype=torch.float64, device=self.device)
        dist.all_reduce(found)
        return float(found)

    def first(self, yes: bool) -> int | None:
        """The first rank that says yes; ``None`` where none does."""
        found = -self.largest(-self.index if yes else -self.count)
        return int(found) if found < self.count else None

    def wait(self) -> None:
        """Until all ranks are here and their devices idle."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        dist.barrier()

    def is_same(self, tensor: Tensor) -> bool:
        """Whether all ranks hold the same bits."""
        first = tensor.contiguous().clone()
        dist.broadcast(first, 0)
        return self.total(float(not torch.equal(first, tensor))) == 0

    def peak_bytes(self) -> int | None:
        """Most memory of any rank since it was last asked; ``None`` on the CPU."""
        if self.device != "cuda":
            return None
        peak = self.largest(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        return int(peak)


def _failure_of(function: Callable[[], Any]) -> Exception | None:
    """What a function raises."""
    try:
        function()
    except Exception as error:
        return error
    return None


def start_ranks(
    count: int, backend: str, work: Callable[..., None], *arguments: Any, seconds: float
) -> bool:
    """Runs ``work(rank, *arguments)`` in processes of this host, talking over its loopback.

    Args:
        count: How many.
        backend: ``"nccl"`` or ``"gloo"``.
        work: A function of a module.
        *arguments: What it gets beside its `Rank`.
        seconds: After which all are ended.

    Returns:
        Whether all came to their end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context: Any = spawn(
        _serve, (count, backend, port, seconds, work, arguments), nprocs=count, join=False
    )
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            # Raises where a process failed, and ends the others.
            if context.join(timeout=1.0):
                return True
    except ProcessException as error:
        print(f"ranks stopped: {str(error).strip().splitlines()[-1]}", flush=True)
        return False
    for process in context.processes:
        process.kill()
    print(f"ranks stopped: not done after {seconds:g} seconds", flush=True)
    return False


def _serve(
    index: int,
    count: int,
    backend: str,
    port: int,
    seconds: float,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(index), "WORLD_SIZE": str(count), "LOCAL_RANK": str(index)}
    # Multicast over NVLink needs rights that containers lack.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = "cuda" if backend == "nccl" else "cpu"
    place = torch.device(device, index) if device == "cuda" else None
    if place is not None:
        torch.cuda.set_device(place)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    dist.init_process_group(
        backend,
        rank=index,
        world_size=count,
        timeout=timedelta(seconds=seconds),
        device_id=place,
    )
    mesh = init_device_mesh(device, (count,))
    work(Rank(index=index, count=count, device=device, mesh=mesh), *arguments)
    dist.barrier()
    dist.destroy_process_group()
