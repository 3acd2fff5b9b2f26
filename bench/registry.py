"""Every benchmark, the files that it writes, and what makes tables and plots of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from . import (
    attention,
    choice,
    commands,
    communication,
    cost_decision,
    decode,
    distributed,
    generation,
    masked,
    other_gpus,
    padding,
    prefill,
    quality,
    real_prompts,
    serve,
    uncompiled,
    video,
)
from .record import FOLDER

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """A benchmark and its files.

    Attributes:
        name: In its files, and as ``python -m bench NAME`` runs it.
        files: Names of its files, a pattern.
        describe: The tables of one file, whose name is given too; ``None`` where nothing shows
            any.
        describe_together: The tables of several, as one.
        draw: Plots of files by their names, into a folder, of the named selector or with it thick;
            returns the paths of what was drawn.
    """

    name: str
    files: str
    describe: Callable[[Any, str], str] | None = None
    describe_together: Callable[[Sequence[Any], str], str] | None = None
    draw: Callable[[Mapping[str, Any], Path, str | None], list[Path]] | None = None

    @property
    def module(self) -> str:
        """What ``python -m`` runs; the demo is a command of the library's."""
        return "unisparse_flex" if self.name == "demo" else f"bench.{self.name}"


BENCHMARKS = (
    Benchmark(
        name="attention",
        files="attention-*.json",
        describe=attention.describe,
        describe_together=attention.describe_together,
        draw=attention.draw,
    ),
    Benchmark(name="choice", files="choice-*.json", describe=choice.describe),
    Benchmark(name="commands", files="command-*.json", describe=commands.describe),
    Benchmark(name="communication", files="communication-*.json", describe=communication.describe),
    Benchmark(name="cost_decision", files="cost-decision-*.json", describe=cost_decision.describe),
    Benchmark(name="cost_rates", files="rates-*.json"),
    Benchmark(
        name="decode",
        files="decode-*.json",
        describe=decode.describe,
        describe_together=decode.describe_together,
    ),
    Benchmark(name="demo", files="demo-*.json"),
    Benchmark(name="distributed", files="distributed-*.json", describe=distributed.describe),
    Benchmark(name="expected_density", files="density-*.json"),
    Benchmark(name="generation", files="generation-*.json", describe=generation.describe),
    Benchmark(name="masked", files="masked-*.json", describe=masked.describe),
    Benchmark(name="other_gpus", files="other-gpus-*.json", describe=other_gpus.describe),
    Benchmark(name="padding", files="padding-*.json", describe=padding.describe),
    Benchmark(name="prefill", files="prefill-*.json", describe=prefill.describe),
    Benchmark(
        name="quality",
        files="quality-*.json",
        describe=quality.describe,
        describe_together=quality.describe_together,
        draw=quality.draw,
    ),
    Benchmark(name="real_prompts", files="real-prompts-*.json", describe=real_prompts.describe),
    Benchmark(name="serve", files="serve-*.json", describe=serve.describe),
    Benchmark(name="uncompiled", files="uncompiled-*.json", describe=uncompiled.describe),
    Benchmark(name="video", files="video-*.json", describe=video.describe),
    Benchmark(name="wide_logits", files="wide-logits-*.json"),
)


def benchmark_of(result: Result, name: str) -> Benchmark:
    """The benchmark that wrote a file: the one it names, or the one whose files are called so.

    Raises:
        ValueError: There is none.
    """
    for benchmark in BENCHMARKS:
        if benchmark.name == result.get("benchmark"):
            return benchmark
    for benchmark in BENCHMARKS:
        if "benchmark" not in result and fnmatch(Path(name).name, benchmark.files):
            return benchmark
    raise ValueError(
        f"{name} must name its benchmark, or be called as one of "
        f"{', '.join(benchmark.files for benchmark in BENCHMARKS)}"
    )


def files_of(*names: str) -> list[Path]:
    """The files in bench/results of these benchmarks."""
    patterns = [benchmark.files for benchmark in BENCHMARKS if benchmark.name in names]
    return sorted(path for pattern in patterns for path in FOLDER.glob(pattern))


def describe(results: Mapping[str, Result]) -> str:
    """The tables of files of one benchmark, by their names.

    Raises:
        ValueError: They are of several benchmarks, or of one without such tables.
    """
    found = {benchmark_of(result, name) for name, result in results.items()}
    if len(found) > 1:
        raise ValueError(f"files must be of one benchmark, got {', '.join(results)}")
    [benchmark], title, values = found, ", ".join(results), list(results.values())
    if len(values) > 1 and benchmark.describe_together is not None:
        return benchmark.describe_together(values, title)
    if len(values) > 1 or benchmark.describe is None:
        raise ValueError(f"nothing makes tables of {title}")
    return benchmark.describe(values[0], title)


def read(paths: Iterable[Path]) -> dict[str, Result]:
    """Files by their names; of two called the same, the second by its path."""
    found: dict[str, Result] = {}
    for path in paths:
        name = str(path) if path.name in found else path.name
        found[name] = json.loads(path.read_text())
    return found
