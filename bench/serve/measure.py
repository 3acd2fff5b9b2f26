"""Time to first token, latency and throughput of vLLM with sparse prefill against its parent.

Each case starts an engine of the parent and one of the plug-in, one after the other.

python -m bench.serve [--cases gate,first-token,...] [--layers 8]
    [--prompt 98304] [--chunks 8192,2048] [--output FILE] [--limit SECONDS]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..record import FOLDER, Record, guarded, numbers
from .compilations import counting_compilations
from .decoding import measure_decode, measure_decode_attention, summaries_row
from .engines import Client, Server, counts_row, serve, vllm_version
from .setup import Bench, create_bench, sparse_settings

CASES = ("gate", "first-token", "lengths", "batch", "beside", "decode-attention", "decode")
REPEATS = 3
# Attention, all blocks kept, in bfloat16: by how much log-probabilities may differ.
GATE = {"bfloat16": 0.1, "float32": 1e-4}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", default=",".join(CASES), help="which, with commas")
    parser.add_argument("--parent", default="FLASH_ATTN", help="backend on a GPU")
    parser.add_argument("--layers", type=int, help="of the model")
    parser.add_argument("--prompt", type=int, help="tokens of the long prompt")
    parser.add_argument("--chunks", type=numbers(int), help="tokens of a step, with commas")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--limit", type=float, default=480.0, help="seconds")
    options = parser.parse_args(arguments)
    cases = options.cases.split(",")
    if not set(cases) <= set(CASES):
        parser.error(f"--cases must be of {', '.join(CASES)}, got {options.cases!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        bench = create_bench(device, Path(folder), options)
        record = Record.create(
            "bench.serve",
            device,
            options.output or FOLDER / f"serve-{device}.json",
            options.limit,
            vllm=vllm_version(),
            model=bench.shape.name,
            weights="random",
            layers=bench.shape.layers,
            dtype=bench.shape.dtype,
            parent=bench.parent or "CPU_ATTN",
        )
        with record.stopping():
            for name in cases:
                record.collect(MEASURES[name](bench))
                if not all(row.get("passed", True) for row in record.content["rows"]):
                    record.stop("the answers with all blocks kept are not the parent's")
                    break
                if record.is_over():
                    break


def measure_gate(bench: Bench) -> Iterator[dict[str, Any]]:
    """With all blocks kept, both engines answer alike; the rest of the file says so or nothing."""
    lengths = (300, 9000, 60, 5000) if bench.parent else (300, 700, 60, 500)
    settings = {"selector": "UniSparse(top_p=1.0)", "min_length": 0}
    row: dict[str, Any] = {"case": "gate", "prompts": lengths, "passed": False}
    answers = {}
    for side, server in bench.sides(max(bench.chunks), settings).items():

        def ask(server: Server = server, side: str = side) -> list[Any]:
            with serve(server) as engine:
                client = Client(engine, bench.shape.vocabulary)
                for length in lengths:
                    client.add(client.prompt(length, 0), 1, logprobs=8)
                found = sorted(client.drain(), key=lambda output: int(output.request_id))
                row[f"{side}_counts"] = counts_row()
                return [output.outputs[0].logprobs[0] for output in found]

        answers[side] = guarded(row, side, ask)
    if None not in answers.values():
        differences = [
            abs(ours[token].logprob - theirs[token].logprob)
            for ours, theirs in zip(answers["sparse"], answers["parent"], strict=True)
            for token in ours.keys() & theirs.keys()
        ]
        row["compared"] = len(differences)
        row["largest_difference"] = max(differences, default=None)
        row["passed"] = bool(differences) and max(differences) <= GATE[bench.shape.dtype]
    yield row


def measure_first_token(bench: Bench) -> Iterator[dict[str, Any]]:
    """Seconds to the first token of one prompt, in chunks and in one step."""
    kinds = [(bench.prompt, chunk) for chunk in bench.chunks] + [(bench.whole, bench.whole)]
    for prompt, chunk in kinds:
        row: dict[str, Any] = {"case": "first-token", "prompt": prompt, "chunk": chunk}
        for side, server in bench.sides(chunk, sparse_settings(prompt), requests=8).items():

            def run(
                server: Server = server,
                prompt: int = prompt,
                side: str = side,
                row: dict[str, Any] = row,
            ) -> None:
                with serve(server) as engine:
                    client = Client(engine, bench.shape.vocabulary)
                    row[f"{side}_first_ms"] = 1e3 * client.first_token(prompt)
                    counts_row()
                    before = start_peak()
                    times = [client.first_token(prompt, seed) for seed in range(1, REPEATS + 1)]
                    row[f"{side}_ms"] = sorted(1e3 * seconds for seconds in times)
                    row[f"{side}_peak_bytes"] = end_peak(before)
                    if side == "sparse":
                        row.update(counts_row())
                        row.update(memory_row(engine, bench, prompt))

            guarded(row, side, run)
        if "sparse_ms" in row and "parent_ms" in row:
            row["ratio"] = median(row["parent_ms"]) / median(row["sparse_ms"])
        yield row


def start_peak() -> int:
    """Bytes that are taken now; the peak is counted from here."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def end_peak(before: int) -> int | None:
    """Bytes at the peak above those at `start_peak`."""
    return torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else None


def memory_row(engine: Any, bench: Bench, prompt: int) -> dict[str, Any]:
    """What the plug-in keeps, beside the cache."""
    shape = bench.shape
    itemsize = 2 if shape.dtype == "bfloat16" else 4
    token = 2 * shape.layers * shape.kv_heads * shape.head_dim * itemsize
    return {**summaries_row(engine), "prompt_cache_bytes": prompt * token}


def measure_lengths(bench: Bench) -> Iterator[dict[str, Any]]:
    """Prompts of many lengths: what is compiled, and the first of a length against the second."""
    chunk = bench.chunks[0]
    row: dict[str, Any] = {"case": "lengths", "chunk": chunk, "lengths": []}
    least = chunk // 2
    step = (bench.prompt * 2 // 3 - least) // bench.lengths
    # None is a multiple of a block.
    wanted = [least + i * step + 37 * i + 1 for i in range(bench.lengths)]

    found: dict[int, dict[str, Any]] = {length: {"prompt": length} for length in wanted}
    for side, server in bench.sides(chunk, sparse_settings(bench.prompt), requests=8).items():

        def run(server: Server = server, side: str = side) -> None:
            with serve(server) as engine, counting_compilations() as before:
                client = Client(engine, bench.shape.vocabulary)
                client.first_token(bench.prompt)
                counts_row()
                with counting_compilations() as after:
                    for length in wanted:
                        pair, taken = [], []
                        for seed in (1, 2):
                            allocations = device_allocations()
                            pair.append(1e3 * client.first_token(length, seed))
                            taken.append(device_allocations() - allocations)
                        found[length][f"{side}_ms"] = pair
                        found[length][f"{side}_device_allocations"] = taken
                if side == "sparse":
                    row["compiled_while_warming_up"] = dict(before)
                    row["compiled_afterwards"] = dict(after)
                    row.update(counts_row())

        guarded(row, side, run)
    row["lengths"] = [pair for pair in found.values() if "sparse_ms" in pair]
    for side in ("parent", "sparse"):
        pairs = [pair[f"{side}_ms"] for pair in found.values() if f"{side}_ms" in pair]
        row[f"{side}_first_over_second"] = sorted(first / second for first, second in pairs)
    yield row


def device_allocations() -> int:
    """How often the allocator has asked the device for memory, which it waits for."""
    return torch.cuda.memory_stats()["num_device_alloc"] if torch.cuda.is_available() else 0


def measure_batch(bench: Bench) -> Iterator[dict[str, Any]]:
    """Many short prompts at once, with the default settings."""
    row: dict[str, Any] = {
        "case": "batch",
        "prompt": bench.small,
        "requests": bench.many,
        "answer": bench.answer,
        "chunk": bench.chunks[0],
    }
    graphs = bench.parent is not None
    for side, server in bench.sides(bench.chunks[0], {}, graphs=graphs).items():

        def run(server: Server = server, side: str = side) -> None:
            with serve(server) as engine:
                client = Client(engine, bench.shape.vocabulary)
                run_batch(client, bench)
                counts_row()
                runs = [run_batch(client, bench) for _ in range(REPEATS)]
                tokens = bench.many * (bench.small + bench.answer)
                row[f"{side}_tokens_per_second"] = sorted(tokens / total for total, _ in runs)
                row[f"{side}_latency_ms"] = sorted(1e3 * latency for _, latency in runs)
                if side == "sparse":
                    row.update(counts_row())

        guarded(row, side, run)
    for name in ("tokens_per_second", "latency_ms"):
        if f"sparse_{name}" in row and f"parent_{name}" in row:
            ours, theirs = median(row[f"sparse_{name}"]), median(row[f"parent_{name}"])
            row[f"{name}_ratio"] = ours / theirs
    yield row


def run_batch(client: Client, bench: Bench) -> tuple[float, float]:
    """Seconds in all, and the median of the steps in which all requests decode."""
    for seed in range(bench.many):
        client.add(client.prompt(bench.small, seed), bench.answer)
    steps = []
    while client.engine.has_unfinished_requests():
        seconds, outputs = client.step()
        steps.append((seconds, len(outputs)))
    decoding = [seconds for seconds, outputs in steps if outputs == bench.many]
    return sum(seconds for seconds, _ in steps), median(decoding[1:-1] or decoding)


def measure_beside(bench: Bench) -> Iterator[dict[str, Any]]:
    """Between two tokens of requests that decode, while a long prompt is computed beside them."""
    graphs = bench.parent is not None
    for chunk in bench.chunks:
        row: dict[str, Any] = {"case": "beside", "prompt": bench.prompt, "chunk": chunk}
        sides = bench.sides(chunk, sparse_settings(bench.prompt), graphs=graphs)
        for side, server in sides.items():

            def run(server: Server = server, side: str = side, row: dict[str, Any] = row) -> None:
                with serve(server) as engine:
                    client = Client(engine, bench.shape.vocabulary)
                    client.first_token(bench.prompt)
                    counts_row()
                    row[f"{side}_beside_ms"], row[f"{side}_alone_ms"] = run_beside(client, bench)
                    if side == "sparse":
                        row.update(counts_row())

            guarded(row, side, run)
        if "sparse_beside_ms" in row and "parent_beside_ms" in row:
            ours, theirs = row["sparse_beside_ms"], row["parent_beside_ms"]
            row["median_ratio"] = median(ours) / median(theirs)
            row["worst_ratio"] = max(ours) / max(theirs)
        yield row


def run_beside(client: Client, bench: Bench) -> tuple[list[float], list[float]]:
    """Milliseconds of the steps with a prompt beside eight that decode, and of those without."""
    for seed in range(8):
        client.add(client.prompt(bench.small // 8, seed), 4 * bench.answer)
    for _ in range(4):
        client.step()
    alone = [1e3 * client.step()[0] for _ in range(16)]
    late = client.add(client.prompt(bench.prompt, 9), 1)
    beside = []
    waiting = True
    while waiting and client.engine.has_unfinished_requests():
        seconds, outputs = client.step()
        beside.append(1e3 * seconds)
        waiting = not any(output.request_id == late for output in outputs)
    names = [output.request_id for output in client.engine.step()]
    client.engine.abort_request(names)
    client.drain()
    return beside, alone


MEASURES: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "gate": measure_gate,
    "first-token": measure_first_token,
    "lengths": measure_lengths,
    "batch": measure_batch,
    "beside": measure_beside,
    "decode-attention": measure_decode_attention,
    "decode": measure_decode,
}


if __name__ == "__main__":
    main()
