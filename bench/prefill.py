"""Times the first token of a Llama-3.1-8B-shaped model with random weights, dense and sparse.

python -m bench.prefill [--lengths 32768,...] [--densities 0.1,...] [--layers 32]
    [--selector default|paper|two] [--compile layers|model] [--max-seconds N] [--output FILE]

Both run with a causal flag and without a mask tensor: stock Transformers builds one under
torch.compile, of S x S entries, and dense attention is then slow or out of memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import unisparse_flex
from unisparse_flex import UniSparse
from unisparse_flex.passes.decision import device_name

from . import markdown
from .calls import DEFAULT, SETTING_NAMES, at_density, create_selector
from .markdown import milliseconds, percent
from .record import FOLDER, Record, guarded, numbers
from .timing import kernel_ms, timed

LENGTHS = (32768, 131072, 65536, 16384)
DENSITIES = (0.1, 0.3)
ATTENTION = "sdpa_causal"
SHAPE = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
}
# A prompt that takes longer is timed once.
LONG_SECONDS, REPEATS = 4.0, 3
KERNELS_NAMED = 8
DENSE_VARIANTS = ("dense_eager", "dense_compiled")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.prefill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lengths", type=numbers(int), default=LENGTHS)
    parser.add_argument("--densities", type=numbers(float), default=DENSITIES)
    parser.add_argument("--selector", choices=SETTING_NAMES, default=DEFAULT)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument(
        "--compile", choices=("layers", "model"), default="layers", help="layers compiles one layer"
    )
    parser.add_argument("--max-seconds", type=float, default=500.0, help="begins no row after it")
    parser.add_argument("--output", type=Path, help="bench/results/prefill-<device>.json")
    parser.add_argument("--small", action="store_true", help="a tiny model, on the CPU if need be")
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() or options.small):
        raise SystemExit("bench.prefill: no CUDA device here; --small tries the script on the CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = device_name(device).replace(" ", "-")
    record = Record.create(
        "bench.prefill",
        device,
        options.output or FOLDER / f"prefill-{name}.json",
        options.max_seconds,
        model={"layers": options.layers, **(SMALL if options.small else SHAPE)},
        compile=options.compile,
        selector=repr(create_selector(options.selector)),
        statistic=f"median of {REPEATS} runs to the first token on the host; one over "
        f"{LONG_SECONDS:g} s runs once; without a cache",
    )
    with torch.no_grad(), record.stopping():
        model = create_model(options.layers, device, small=options.small)
        record.collect(measure(model, options, device))
    print(f"written to {record.output}", flush=True)


def create_model(
    layers: int,
    device: str,
    *,
    small: bool = False,
    attention: str = ATTENTION,
    window: int | None = None,
) -> Any:
    """The model, its weights drawn where it runs; with a sliding window it is a Mistral."""
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *_, **__: None)
    windowed = {} if window is None else {"sliding_window": window}
    config = (LlamaConfig if window is None else MistralConfig)(
        **(SMALL if small else SHAPE),
        **windowed,
        num_hidden_layers=layers,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    return model.to(device).eval()


def measure(model: Any, options: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    """Dense rows of a length, then sparse ones."""
    for tokens in options.lengths:
        ids = torch.randint(model.config.vocab_size, (1, tokens), device=device)
        dense: dict[str, Any] = {}
        for variant in DENSE_VARIANTS:
            row = {"variant": variant, "tokens": tokens, "layers": options.layers}
            yield _measure_variant(model, ids, row, None, options, dense)
        for density in options.densities:
            selector, top = at_density(options.selector, tokens, density)
            row = {"variant": "sparse", "tokens": tokens, "layers": options.layers}
            row |= {"selector": options.selector, "density": density}
            row |= {"top_k": top.count, "density_expected": top.density}
            yield _measure_variant(model, ids, row, selector, options, dense)


def _measure_variant(
    model: Any,
    ids: Tensor,
    row: dict[str, Any],
    selector: UniSparse | None,
    options: argparse.Namespace,
    dense: dict[str, Any],
) -> dict[str, Any]:
    """One row; times and logits of dense ones go into ``dense``."""
    on_gpu = ids.device.type == "cuda"
    compiled = row["variant"] != "dense_eager"
    torch._dynamo.reset()

    def time_it() -> None:
        run = prepare(model, selector, options.compile if compiled else "")

        def first_token() -> Tensor:
            logits: Tensor = run(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            logits.argmax(-1).item()
            return logits

        logits, seconds = timed(first_token, ids.device)
        logits, row["first_call_seconds"] = logits.float(), round(seconds, 2)
        if "logits" in dense:
            error = (logits - dense["logits"]).norm() / dense["logits"].norm()
            row["logits_relative_error"] = float(error)
        if on_gpu:
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        times = [timed(first_token, ids.device)[1]]
        if on_gpu:
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - held
        if times[0] < LONG_SECONDS:
            times += [timed(first_token, ids.device)[1] for _ in range(REPEATS - 1)]
        row["ms"], row["repeats"] = median(times) * 1e3, len(times)
        if selector is None:
            dense.setdefault("logits", logits)
            dense[row["variant"]] = row["ms"]
        _compare(row, dense)
        if on_gpu and times[0] < LONG_SECONDS:
            found = guarded(row, "kernels", lambda: kernel_ms(first_token, calls=1)) or {}
            slowest = sorted(found, key=lambda name: -found[name])[:KERNELS_NAMED]
            row["kernels_ms"] = {name[:80]: found[name] for name in slowest}

    guarded(row, "prefill", time_it)
    guarded(row, "release", lambda: release(model))
    return row


def prepare(model: Any, selector: UniSparse | None, compile_what: str) -> Any:
    """The model as it runs: optimized where there is a selector, and compiled."""
    if selector is not None:
        parts = model.model.layers if compile_what == "layers" else model
        unisparse_flex.optimize(parts, selector, min_length=0)
    if compile_what == "model":
        return torch.compile(model, dynamic=False)
    if compile_what == "layers":
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    return model


def release(model: Any) -> None:
    """Undoes `prepare`."""
    for layer in model.model.layers:
        layer._compiled_call_impl = None
    unisparse_flex.restore(model)


def _compare(row: dict[str, Any], dense: dict[str, Any]) -> None:
    times: Sequence[float] = [dense[name] for name in DENSE_VARIANTS if name in dense]
    if times:
        row["dense_ms"] = min(times)
        row["speedup"] = min(times) / row["ms"]


COLUMNS: dict[str, markdown.Format] = {
    "tokens": "{}",
    "variant": "{}",
    "density": percent,
    "ms": milliseconds,
    "speed-up": "{:.2f}x",
    "peak GiB": "{:.1f}",
}


def describe(result: dict[str, Any], name: str) -> str:
    """The table of one file."""
    title = f"{name}: {result['device']}, torch {result['versions'].get('torch')}"
    model = result["model"]
    size = f"{model['layers']} layers of width {model['hidden_size']}."
    return markdown.page(*markdown.heading(title, result), size, prefill_table(result))


def prefill_table(result: dict[str, Any]) -> str:
    """Milliseconds to the first token, and the speed-up over the faster dense run."""
    names = ("tokens", "variant", "density_expected", "ms", "speedup", "peak_bytes")
    lines = []
    for row in sorted(result["rows"], key=lambda row: row["tokens"]):
        *line, peak = (row.get(name) for name in names)
        lines.append([*line, None if peak is None else peak / 2**30])
    return markdown.table(COLUMNS, lines)


if __name__ == "__main__":
    main()
