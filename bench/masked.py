"""Prompts with masks: a tokenizer's ones, padded batches, packed documents, sliding windows.

python -m bench.masked [--parts models,calls,lengths,host] [--cases none,ones,padded,...]
    [--tokens 32768,...] [--batches 1,...] [--density 0.1] [--layers 4]
    [--modes eager,compiled] [--variants dense,causal,forced,default,without] [--sharpen 2]
    [--max-seconds N] [--output FILE]

models: milliseconds to the logits of a Llama-3.1-8B-shaped model with random weights, stock
    Transformers, dense and sparse, eager and compiled; at a forced density and at default settings.
    Projections of queries and keys are multiplied: random ones leave attention diffuse.
calls: one attention call of its heads under each mask, and the selection in it.
lengths: twenty lengths through one compiled call, and how often it was compiled.
host: microseconds that Python takes to launch one call, one compiled addition, and each further
    call of a compiled forward (`further`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import unisparse_flex
from unisparse_flex import Selector, UniSparse
from unisparse_flex.passes.decision import device_name
from unisparse_flex.reports import record_attention
from unisparse_flex.selectors import DEFAULT_SELECTOR

from . import markdown
from .calls import Heads, choose_top_k, create_inputs
from .markdown import milliseconds, percent
from .prefill import create_model, release
from .record import FOLDER, Record, guarded, numbers
from .timing import graph_ms, host_seconds, timed

PARTS = ("models", "calls", "lengths", "host")
CASES = ("none", "ones", "padded", "documents", "window")
HEADS, SMALL_HEADS = (
    Heads(query=32, key=8, head_dim=128),
    Heads(query=4, key=2, head_dim=16),
)
# Padding before the rows of a batch, of its length; documents in a prompt; keys in a window.
PADDED = (0.0, 0.061, 0.244, 0.4273)
DOCUMENTS, WINDOW_SHARE = 8, 8
REPEATS = 5
LENGTHS = tuple(range(1000, 33001, 1684))
HOST_TOKENS, HOST_CALLS = 1024, 200
# Attention calls of one forward, few and many: the difference is what each further one takes.
FEW, MANY = 2, 10
# No prompt is as long.
LONGEST = 2**30


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.masked",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--tokens", type=numbers(int), default=(32768,))
    parser.add_argument("--batches", type=numbers(int), default=(1,))
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--modes", default="eager,compiled")
    parser.add_argument("--variants", default="dense,forced,default")
    parser.add_argument("--sharpen", type=float, default=2.0, help="on queries and keys each")
    parser.add_argument("--max-seconds", type=float, default=500.0, help="begins no row after it")
    parser.add_argument("--output", type=Path, help="bench/results/masked-<device>.json")
    parser.add_argument("--small", action="store_true", help="a tiny model, on the CPU if need be")
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() or options.small):
        raise SystemExit("bench.masked: no CUDA device here; --small tries the script on the CPU")
    bench = Bench(
        device="cuda" if torch.cuda.is_available() else "cpu",
        small=options.small,
        density=options.density,
        layers=options.layers,
        sharpen=options.sharpen,
        modes=tuple(options.modes.split(",")),
        names=tuple(options.variants.split(",")),
    )
    name = device_name(bench.device).replace(" ", "-")
    record = Record.create(
        "bench.masked",
        bench.device,
        options.output or FOLDER / f"masked-{name}.json",
        options.max_seconds,
        weights="random",
        layers=options.layers,
        density=options.density,
        sharpen=options.sharpen,
        selector=repr(DEFAULT_SELECTOR),
        statistic=f"models: median of {REPEATS} runs to the logits of the last token",
    )
    parts = [getattr(bench, part) for part in options.parts.split(",")]
    with torch.no_grad(), record.stopping():
        for part in parts:
            for tokens in options.tokens:
                for batch in options.batches:
                    for case in options.cases.split(","):
                        record.collect(part(case, tokens, batch))
                        if "stopped" in record.content:
                            return


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What is measured, where, and of which model.

    Attributes:
        device: ``cuda`` or ``cpu``.
        small: A tiny model and few heads.
        density: Of the visible blocks that a forced setting keeps.
        layers: Of the model.
        sharpen: Factor on the projections of queries, and of keys.
        modes: ``eager``, ``compiled``.
        names: Of the variants of a model: ``dense``; ``causal``, optimized with every call dense,
            which in a compiled graph loses the mask tensor that transformers makes there;
            ``forced``, ``default``, and ``without`` attention, which is what any attention leaves
            to be done.
    """

    device: str
    small: bool
    density: float
    layers: int
    sharpen: float
    modes: tuple[str, ...]
    names: tuple[str, ...]

    def models(self, case: str, tokens: int, batch: int) -> Iterator[dict[str, Any]]:
        """Rows of one case: dense, at the forced density, and as default settings decide."""
        window = max(tokens // WINDOW_SHARE, 1) if case == "window" else None
        model = create_model(
            self.layers, self.device, small=self.small, attention="sdpa", window=window
        )
        for layer in model.model.layers:
            for project in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                project.weight.mul_(self.sharpen)
        given = model_inputs(case, tokens, batch, model.config.vocab_size, self.device)
        exact: dict[str, Tensor] = {}
        for mode in self.modes:
            for variant, settings in self.variants(tokens).items():
                row: dict[str, Any] = {"part": "models", "case": case, "tokens": tokens}
                row |= {"batch": batch, "mode": mode, "variant": variant}
                guarded(row, "run", partial(self._time_model, model, given, settings, row, exact))
                guarded(row, "release", partial(_release, model))
                yield row

    def variants(self, tokens: int) -> dict[str, dict[str, Any] | None]:
        """Arguments of `optimize` by name; ``None`` leaves the model alone."""
        every: dict[str, dict[str, Any] | None] = {
            "dense": None,
            "causal": {"min_length": LONGEST},
            "forced": {"selector": self.forced(tokens), "min_length": 0},
            "default": {},
            "without": None,
        }
        return {name: every[name] for name in self.names}

    def forced(self, tokens: int) -> Selector:
        """The default's scores, and so many blocks of each row."""
        top = choose_top_k(-(-tokens // DEFAULT_SELECTOR.block_size), self.density)
        return UniSparse(top_k=top.count)

    def _time_model(
        self,
        model: Any,
        given: dict[str, Tensor],
        settings: dict[str, Any] | None,
        row: dict[str, Any],
        exact: dict[str, Tensor],
    ) -> None:
        torch._dynamo.reset()
        if settings is not None:
            unisparse_flex.optimize(model, **settings)
        run = torch.compile(model, dynamic=False) if row["mode"] == "compiled" else model

        def logits() -> Tensor:
            found: Tensor = run(**given, use_cache=False, logits_to_keep=1).logits[:, -1]
            return found

        device = torch.device(self.device)
        if row["variant"] == "without":
            with patch.object(F, "scaled_dot_product_attention", sum_alone):
                row["first_call_seconds"] = timed(logits, device)[1]
                row["ms"] = median(timed(logits, device)[1] for _ in range(REPEATS)) * 1e3
            return
        found, row["first_call_seconds"] = timed(logits, device)
        reference = exact.setdefault("dense", found.double())
        row["logits_relative_error"] = float((found - reference).norm() / reference.norm())
        row["ms"] = median(timed(logits, device)[1] for _ in range(REPEATS)) * 1e3
        if settings is not None:
            guarded(row, "density", partial(self._note_density, model, given, row))

    def _note_density(self, model: Any, given: dict[str, Tensor], row: dict[str, Any]) -> None:
        """Mean kept over visible blocks of its calls, uncompiled; 1 of a dense one."""
        with record_attention(model) as calls:
            model(**given, use_cache=False, logits_to_keep=1)
        kept = [1.0 if call.density is None else call.density for call in calls]
        row["density"] = sum(kept) / len(kept)
        row["sparse_calls"] = sum(call.decision == "sparse" for call in calls)

    def calls(self, case: str, tokens: int, batch: int) -> Iterator[dict[str, Any]]:
        """One row: a call under the mask, dense and sparse, and its selection alone."""
        query, key, value = (
            tensor.expand(batch, -1, -1, -1).contiguous()
            for tensor in create_inputs(self.heads, tokens, self.dtype, self.device)
        )
        ids, mask = call_mask(case, tokens, batch, self.device)
        row: dict[str, Any] = {"part": "calls", "case": case, "tokens": tokens, "batch": batch}
        torch._dynamo.reset()
        selector = self.forced(tokens)
        plain = torch.compile(Masked(mask), dynamic=False)
        sparse = torch.compile(
            unisparse_flex.optimize(Masked(mask), selector, min_length=0), dynamic=False
        )
        row["dense_ms"] = guarded(
            row, "dense", lambda: self.time(lambda: plain(query, key, value, ids))
        )
        row["sparse_ms"] = guarded(
            row, "sparse", lambda: self.time(lambda: sparse(query, key, value, ids))
        )

        if mask is not None and self.device == "cuda":
            pairs = mask(ids)
            given = query, key, value
            row["flex_ms"] = guarded(row, "flex", lambda: self._flex_ms(pairs, given))
        yield row

    def _flex_ms(self, pairs: Tensor, given: tuple[Tensor, Tensor, Tensor]) -> float:
        """FlexAttention with the mask's own blocks, which are found before."""
        batch, _, rows, keys = pairs.shape
        visible = create_block_mask(
            lambda b, h, q, kv: pairs[b, 0, q, kv], batch, None, rows, keys, self.device
        )
        run: Any = torch.compile(partial(flex_attention, enable_gqa=True), dynamic=False)
        return self.time(lambda: run(*given, block_mask=visible))

    def lengths(self, case: str, tokens: int, batch: int) -> Iterator[dict[str, Any]]:
        """One row: how often `LENGTHS` up to ``tokens`` make a call compile."""
        _, mask = call_mask(case, 1, batch, self.device)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = unisparse_flex.optimize(Masked(mask), self.forced(tokens), min_length=0)
        run, seconds = torch.compile(model), []
        for length in (length for length in LENGTHS if length <= tokens):
            tensors = create_inputs(self.heads, length, self.dtype, self.device)
            ids, _ = call_mask(case, length, 1, self.device)
            seconds.append(timed(partial(run, *tensors, ids), torch.device(self.device))[1])
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        yield {
            "part": "lengths",
            "case": case,
            "lengths": len(seconds),
            "compilations": compiled,
            "slowest_seconds": sorted(seconds)[::-1][:4],
        }

    def host(self, case: str, tokens: int, batch: int) -> Iterator[dict[str, Any]]:
        """One row: the time from one launch to the next, of calls too short to wait for."""
        given = create_inputs(self.heads, HOST_TOKENS, self.dtype, self.device)
        ids, mask = call_mask(case, HOST_TOKENS, 1, self.device)
        row: dict[str, Any] = {"part": "host", "case": case, "tokens": HOST_TOKENS}
        torch._dynamo.reset()
        settings: dict[str, Any] = {"selector": self.forced(HOST_TOKENS), "min_length": 0}
        optimized = unisparse_flex.optimize(Masked(mask), **settings)
        variants: dict[str, Callable[..., Tensor]] = {
            # What compiled code takes whatever it does.
            "addition_compiled": torch.compile(lambda query, *_: query + 1, dynamic=False),
            "dense_eager": Masked(mask),
            "dense_compiled": torch.compile(Masked(mask), dynamic=False),
            "sparse_compiled": torch.compile(optimized, dynamic=False),
            "sparse_eager": unisparse_flex.optimize(Masked(mask), **settings),
        }
        for name, run in variants.items():
            call = partial(run, *given, ids)
            seconds = guarded(row, name, partial(host_seconds, call, HOST_CALLS))
            row[f"{name}_us"] = None if seconds is None else seconds * 1e6
        for name in ("dense", "sparse"):
            own = settings if name == "sparse" else None
            further = partial(self._further_us, mask, (*given, ids), own)
            row[f"{name}_further_us"] = guarded(row, f"{name}_further", further)
        yield row

    def _further_us(
        self,
        mask: Callable[[Tensor], Tensor] | None,
        given: Sequence[Tensor],
        settings: dict[str, Any] | None,
    ) -> float:
        """Microseconds of each further call of a compiled forward, whose guards and mask it has.

        Args:
            mask: As of `Masked`.
            given: Its inputs.
            settings: Arguments of `optimize`; ``None`` leaves it alone.
        """
        seconds = []
        for calls in (FEW, MANY):
            torch._dynamo.reset()
            model = Masked(mask, calls)
            if settings is not None:
                unisparse_flex.optimize(model, **settings)
            run = torch.compile(model, dynamic=False)
            seconds.append(host_seconds(partial(run, *given), -(-HOST_CALLS // calls)))
        return (seconds[1] - seconds[0]) / (MANY - FEW) * 1e6

    def time(self, call: Callable[[], Any]) -> float:
        """Milliseconds of a call, on a GPU without the gaps between its launches."""
        if self.device == "cuda":
            return graph_ms(call)
        call()
        return timed(call, torch.device(self.device))[1] * 1e3

    @property
    def heads(self) -> Heads:
        """Of one attention call."""
        return SMALL_HEADS if self.small else HEADS

    @property
    def dtype(self) -> torch.dtype:
        """Of its tensors."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


def sum_alone(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """In the place of attention: the sum of a row's query, key and value.

    All three are read: compiled code leaves out what makes a tensor that nobody wants.
    """
    group = query.shape[1] // value.shape[1]
    own = (key + value)[:, :, -query.shape[2] :]
    return query + own.repeat_interleave(group, 1)


class Masked(nn.Module):
    """Attention under a mask that the model makes of ids; causal alone without one.

    Args:
        mask: Makes it.
        calls: Attention calls, each with the output of the one before as its query.
    """

    def __init__(self, mask: Callable[[Tensor], Tensor] | None, calls: int = 1) -> None:
        super().__init__()
        self.mask, self.calls = mask, calls

    def forward(self, query: Tensor, key: Tensor, value: Tensor, ids: Tensor) -> Tensor:
        mask = None if self.mask is None else self.mask(ids)
        for _ in range(self.calls):
            query = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        return query


def paddings(tokens: int, batch: int, device: str) -> Tensor:
    """Tokens of padding before each row: int64 [B, 1]."""
    shares = [PADDED[row % len(PADDED)] if batch > 1 else PADDED[1] for row in range(batch)]
    return torch.tensor([[round(share * tokens)] for share in shares], device=device)


def model_inputs(
    case: str, tokens: int, batch: int, vocabulary: int, device: str
) -> dict[str, Tensor]:
    """What a tokenizer, or who packs documents, hands to the model."""
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device}
    given = {"input_ids": torch.randint(vocabulary, (batch, tokens), **options)}
    position = torch.arange(tokens, device=device).expand(batch, -1)
    if case == "ones":
        given["attention_mask"] = torch.ones_like(position)
    elif case == "padded":
        given["attention_mask"] = (position >= paddings(tokens, batch, device)).long()
    elif case == "documents":
        given["position_ids"] = position % -(-tokens // DOCUMENTS)
    return given


def call_mask(
    case: str, tokens: int, batch: int, device: str
) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """Ids [B, S], and how a model makes its mask [1 or B, 1, S, S] of them."""
    position = torch.arange(tokens, device=device).expand(batch, -1)

    def causal(ids: Tensor) -> Tensor:
        row = torch.arange(ids.shape[1], device=ids.device)
        return (row[None, :] <= row[:, None])[None, None]

    def windowed(ids: Tensor) -> Tensor:
        row = torch.arange(ids.shape[1], device=ids.device)
        width = ids.shape[1] // WINDOW_SHARE
        return causal(ids) & (row[:, None] - row[None, :] < width)[None, None]

    def padded(ids: Tensor) -> Tensor:
        return causal(ids) & (ids > 0)[:, None, None, :]

    def documents(ids: Tensor) -> Tensor:
        return causal(ids) & (ids[:, :, None] == ids[:, None, :])[:, None]

    masks = {"none": None, "ones": padded, "padded": padded}
    masks |= {"documents": documents, "window": windowed}
    ids = {
        "padded": (position >= paddings(tokens, batch, device)).long(),
        "documents": position // -(-tokens // DOCUMENTS),
    }
    return ids.get(case, torch.ones_like(position)), masks[case]


def _release(model: Any) -> None:
    release(model)
    torch._dynamo.reset()


COLUMNS: dict[str, dict[str, markdown.Format]] = {
    "models": {
        **dict.fromkeys(("case", "tokens", "batch", "mode", "variant"), "{}"),
        "ms": milliseconds,
        "of dense": "{:.3f}",
        "density": percent,
        "first call s": "{:.1f}",
        "error": "{:.1e}",
    },
    "calls": {
        **dict.fromkeys(("case", "tokens", "batch"), "{}"),
        **dict.fromkeys(("dense ms", "flex ms", "sparse ms"), milliseconds),
    },
    "lengths": dict.fromkeys(("case", "lengths", "compilations"), "{}"),
    "host": {
        **dict.fromkeys(("case", "tokens"), "{}"),
        **dict.fromkeys(
            (
                "addition compiled us",
                "dense eager us",
                "dense compiled us",
                "sparse compiled us",
                "sparse eager us",
                "dense further us",
                "sparse further us",
            ),
            "{:.0f}",
        ),
    },
}
# What a column holds where it is not called as it is.
FIELDS = {"first call s": "first_call_seconds", "error": "logits_relative_error"}


def describe(result: Mapping[str, Any], name: str) -> str:
    """The tables of one file, one for each part."""
    title = (
        f"{name}: {result['device']}, torch {result['versions'].get('torch')}, {result['weights']} "
        f"weights, queries and keys times {result.get('sharpen', 1)} each, "
        f"{result['layers']} layers, forced density {result['density']}"
    )
    rows = [dict(row) for row in result["rows"]]
    for row in rows:
        if "mode" in row:
            row["of_dense"] = _of_dense(row, rows)
    tables = [
        markdown.table(
            columns,
            [
                [
                    row.get(FIELDS.get(column, column.replace(" ", "_")), row.get(column))
                    for column in columns
                ]
                for row in rows
                if row["part"] == part
            ],
        )
        for part, columns in COLUMNS.items()
    ]
    return markdown.page(*markdown.heading(title, result), *tables)


def _of_dense(row: Mapping[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Its time over the dense model's in the same mode."""
    same = ("case", "tokens", "batch", "mode")
    for other in rows:
        is_dense = other.get("variant") == "dense" and "ms" in other and "ms" in row
        if is_dense and all(other[field] == row[field] for field in same):
            return float(row["ms"] / other["ms"])
    return None


if __name__ == "__main__":
    main()
