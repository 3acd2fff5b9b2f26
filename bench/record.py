"""The JSON that a measurement leaves behind, written anew after every row."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unisparse_flex.block_masks.installation import installed_version
from unisparse_flex.evaluation import describe_device

# Where the files that are kept lie.
FOLDER = Path("bench/results")
PACKAGES = ("torch", "triton", "transformers", "flash-attn-4", "flash-attn")


class DeviceLost(RuntimeError):
    """No further row can run on the device."""


@dataclass(kw_only=True)
class Record:
    """A file of rows.

    Attributes:
        output: Where it is written.
        limit: Seconds after which no row is begun.
        content: What the file holds.
    """

    output: Path
    limit: float
    content: dict[str, Any]
    start: float = field(default_factory=time.perf_counter)

    @classmethod
    def create(
        cls, module: str, device: str | None, output: Path, limit: float, /, **more: Any
    ) -> Record:
        """A file that says where its rows come from.

        Args:
            module: The benchmark's, as in ``python -m``.
            device: What is measured; ``None`` where nothing runs on one.
            output: Where the file is written; its folder is made.
            limit: Seconds after which no row is begun.
            **more: What else the file says before its rows.
        """
        content = {
            "schema": 1,
            "benchmark": module.removeprefix("bench."),
            **({} if device is None else {"device": describe_device(torch.device(device))}),
            "versions": versions(),
            "command": ["python", "-m", module, *map(_without_folder, sys.argv[1:])],
            **more,
            "rows": [],
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        return cls(output=output, limit=limit, content=content)

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row, prints it and writes the file."""
        self.content["rows"].append(row)
        print(json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        """Writes the file as a whole: a cut run leaves the last one."""
        self.content["seconds"] = round(time.perf_counter() - self.start, 1)
        part = self.output.with_name(self.output.name + ".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(part, self.output)

    def stop(self, why: str) -> None:
        """Says why rows are missing."""
        self.content["stopped"] = why
        print(f"stopped: {why}", flush=True)
        self.write()

    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.perf_counter() - self.start > self.limit

    def stop_if_over(self) -> bool:
        """`is_over`; where it is, the file says so."""
        if self.is_over():
            self.stop(f"after {self.limit:g} seconds")
            return True
        return False

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Writes the file at the end, also where a hand or a lost device ended what is inside."""
        try:
            yield
        except KeyboardInterrupt:
            self.stop("by hand")
        except DeviceLost as error:
            self.stop(f"device lost: {error}")
        self.write()

    def collect(self, rows: Iterable[dict[str, Any]]) -> None:
        """Adds rows as they come, until the time is up."""
        for row in rows:
            self.add(row)
            if self.stop_if_over():
                break


def _without_folder(argument: str) -> str:
    """A file that lies elsewhere by its name alone: its folder is of one machine."""
    path = Path(argument)
    return path.name if path.is_absolute() else argument


def versions() -> dict[str, str | None]:
    """Versions of what the timings depend on; ``None`` for what is not installed."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    found |= {name: installed_version(name) for name in PACKAGES}
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def guarded(row: dict[str, Any], name: str, run: Callable[[], Any]) -> Any:
    """What ``run`` returns; ``None``, and its error in the row, where it fails.

    Raises:
        DeviceLost: Nothing runs on the device any more.
    """
    try:
        return run()
    except DeviceLost:
        raise
    except Exception as error:
        row.setdefault("errors", {})[name] = describe(error)
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(describe(error)) from error
    return None


def numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
    """Reads an option of numbers with commas between them."""

    def parse(text: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in text.split(",") if part)

    return parse


def describe(error: Exception) -> str:
    """Kind and first lines of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"
