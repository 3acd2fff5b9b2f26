"""Processes of a group that run functions for tests, one after the other.

Starting a process takes seconds, so tests share them. Loopback only.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

# A collective that waits longer for a rank fails; a rank may compile meanwhile.
GROUP_SECONDS = 240
START_SECONDS = 180
# Other tests run beside these on the same cores.
SLACK = 3


class RankFailed(AssertionError):
    """A function raised on some rank, or did not come back."""


class Ranks:
    """A group of processes; ``run`` calls a function on each.

    Args:
        size: How many.
        patience: Seconds after which a collective that waits for a rank fails.
        backend: ``"gloo"``, or ``"nccl"`` for as many GPUs.
    """

    def __init__(
        self, size: int, patience: float = GROUP_SECONDS, *, backend: str = "gloo"
    ) -> None:
        self.size, self.patience, self.backend = size, patience, backend
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        group = (self.size, store, self.patience, self.backend)
        pipes = [context.Pipe() for _ in range(self.size)]
        self._pipes = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, *group, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        if any(isinstance(answer, Failure) for answer in self._collect(START_SECONDS)):
            raise RankFailed("a process ended while it started; its error is above")

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = 100.0) -> list[Any]:
        """``function(*args)`` on every rank: what each returns.

        Raises:
            RankFailed: A rank raised, or did not answer within ``seconds``.
        """
        results = self.attempt(function, *args, seconds=seconds)
        failed = [f"rank {i}: {r}" for i, r in enumerate(results) if isinstance(r, Failure)]
        if failed:
            # Their connections may be broken: the next test starts others.
            self._end()
            raise RankFailed("\n".join(failed))
        return results

    def attempt(self, function: Callable[..., Any], *args: Any, seconds: float = 60.0) -> list[Any]:
        """As `run`, with a `Failure` for what a rank raised."""
        if not all(process.is_alive() for process in self._processes):
            # An earlier test lost some.
            self.close()
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._collect(seconds)

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(2)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()

    def _collect(self, seconds: float) -> list[Any]:
        end = time.monotonic() + SLACK * seconds
        results: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, end - time.monotonic())):
                self._end()
                raise RankFailed(f"rank {rank} did not answer within {seconds:g} seconds")
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append(Failure("EOFError", "the process is gone", ""))
        return results


class Failure:
    """What a rank raised.

    Attributes:
        kind: Class of the exception.
        message: Its text.
        trace: Where it was raised.
    """

    def __init__(self, kind: str, message: str, trace: str) -> None:
        self.kind, self.message, self.trace = kind, message, trace

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}\n{self.trace}"


def _serve(
    rank: int, size: int, store: str, patience: float, backend: str, pipe: Connection
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if backend == "nccl":
        # Multicast over NVLink needs rights that containers lack.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=patience),
    )
    pipe.send(None)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            break
        try:
            result = function(*args)
        except Exception as error:
            result = Failure(type(error).__name__, str(error), traceback.format_exc())
        pipe.send(result)
    dist.destroy_process_group()
