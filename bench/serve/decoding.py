"""Decoding with a choice of keys against the parent: attention alone, and engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from statistics import median
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..record import guarded
from .engines import Client, Server, Shape, counts_row, serve
from .setup import Bench, sparse_settings

if TYPE_CHECKING:
    from unisparse_flex.integrations.vllm.decode_rows import DecodeRows

# Of a request's keys.
SHARE = 0.1
DECODE: dict[str, Any] = {"share": SHARE, "min_keys": 0}
# Steps in which all requests decode: timed ones after some that are not.
STEPS, UNTIMED = 48, 4
PAGE = 128
REPEATS = 20
# Of a model, in one graph.
LAYERS = 8


def measure_decode(bench: Bench) -> Iterator[dict[str, Any]]:
    """Tokens a second of requests that decode together, in CUDA graphs."""
    for layers, cases in groupby(bench.decoding, itemgetter(2)):
        yield from _measure_together(bench.with_layers(layers), [case[:2] for case in cases])


def _measure_together(bench: Bench, cases: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """The cases of one model."""
    rows: list[dict[str, Any]] = [
        {"case": "decode", "requests": n, "prompt": length, "layers": bench.shape.layers}
        for n, length in cases
    ]
    settings = {**sparse_settings(bench.whole), "decode": DECODE}
    del settings["min_length"]
    graphs = bench.parent is not None
    most = max(n for n, _ in cases)
    servers = {
        "parent": bench.server(bench.whole, None, graphs=graphs, requests=most, memory=0.46),
        "sparse": bench.server(bench.whole, settings, graphs=graphs, requests=most, memory=0.46),
    }
    for side, server in servers.items():

        def run(server: Server = server, side: str = side) -> None:
            with serve(server) as engine:
                client = Client(engine, bench.shape.vocabulary)
                for row in rows:
                    counts_row()
                    steps = run_decode(client, row["requests"], row["prompt"])
                    row[f"{side}_step_ms"] = sorted(1e3 * seconds for seconds in steps)
                    if side == "sparse":
                        found = counts_row()
                        row["decode_density"] = found["decode_density"]
                        row["decode_rows"] = found["decode_rows"]
                if side == "sparse":
                    rows[0].update(summaries_row(engine))

        guarded(rows[0], side, run)
    for row in rows:
        if "sparse_step_ms" in row and "parent_step_ms" in row:
            row["ratio"] = median(row["parent_step_ms"]) / median(row["sparse_step_ms"])
    return rows


def run_decode(client: Client, requests: int, prompt: int) -> list[float]:
    """Seconds of steps in which so many requests decode, after prompts of random tokens."""
    for seed in range(requests):
        client.add(client.prompt(prompt, seed), requests + STEPS + UNTIMED + 8)
    found: list[float] = []
    names: set[str] = set()
    while len(found) < STEPS + UNTIMED and client.engine.has_unfinished_requests():
        seconds, outputs = client.step()
        names |= {output.request_id for output in outputs}
        if len(outputs) == requests and len(names) == requests:
            found.append(seconds)
    client.engine.abort_request(sorted(names))
    client.drain()
    return found[UNTIMED:]


def summaries_row(engine: Any) -> dict[str, Any]:
    """What the plug-in keeps beside the cache."""
    taken = cache = 0
    config = engine.llm_engine.vllm_config
    for layer in config.compilation_config.static_forward_context.values():
        state = getattr(getattr(layer, "impl", None), "unisparse", None)
        if state is not None and state.summaries is not None:
            taken += state.summaries.nbytes
            cache += layer.kv_cache.numel() * layer.kv_cache.element_size()
    return {"summaries_bytes": taken, "cache_bytes": cache}


def measure_decode_attention(bench: Bench) -> Iterator[dict[str, Any]]:
    """One layer's attention of a decoding step in a CUDA graph, the choice of keys included."""
    if bench.parent != "FLASH_ATTN":
        return
    for requests, length, _ in bench.decoding:
        # As in nearly all steps no page ends.
        keys = length - PAGE // 4
        row: dict[str, Any] = {
            "case": "decode-attention",
            "requests": requests,
            "prompt": keys,
        }

        def run(requests: int = requests, keys: int = keys, row: Any = row) -> None:
            row.update(time_layer(bench.shape, requests, keys, bench.longest))

        guarded(row, "all", run)
        if "sparse_us" in row:
            row["ratio"] = row["parent_us"] / row["sparse_us"]
        yield row


def time_layer(shape: Shape, requests: int, length: int, longest: int) -> dict[str, Any]:
    """Microseconds of a layer: the parent's attention, choice and attention, and its parts.

    As in an engine for requests of up to ``longest`` tokens.

    Layers with caches of their own follow one another, as in a model: what one of them read is no
    longer in the GPU's own cache when its turn comes again.
    """
    layers = [Layer(shape, requests, length, longest, seed) for seed in range(LAYERS)]
    first = layers[0]
    # Where keys stand that are written in one step; none is the last of its page.
    places = torch.arange(requests, device=first.tables.device) * PAGE // requests + PAGE // 2
    own = first.last_pages * PAGE + (length - 1) % PAGE
    middle = first.last_pages * PAGE + places % (PAGE - 1)
    end = first.last_pages * PAGE + PAGE - 1

    def each(call: Callable[[Layer], None]) -> float:
        def run() -> None:
            for layer in layers:
                call(layer)

        return time_graph(run) / LAYERS

    def sparse(layer: Layer) -> None:
        if not first.rows.is_behind:
            layer.summaries.update(own)
        layer.attend_sparse(first.rows)

    return {
        "layers": LAYERS,
        "parent_us": each(Layer.attend_parent),
        "sparse_us": each(sparse),
        "choice_us": each(Layer.choose),
        "choice_with_update_us": each(lambda layer: layer.choose(is_behind=True)),
        "update_us": each(lambda layer: layer.summaries.update(middle)),
        "update_page_us": each(lambda layer: layer.summaries.update(end)),
    }


class Layer:
    """A layer's cache of random keys for requests of one length, and a query for each."""

    def __init__(self, shape: Shape, requests: int, length: int, longest: int, seed: int) -> None:
        from vllm.v1.attention.backends.fa_utils import (
            get_flash_attn_version,
            get_scheduler_metadata,
        )

        from unisparse_flex.block_masks.pages import DecodeSelector, PageSummaries
        from unisparse_flex.integrations.vllm.cache_view import CacheView
        from unisparse_flex.integrations.vllm.decode_rows import (
            DecodeRows,
            DecodeSpace,
            follows_keys,
        )
        from unisparse_flex.integrations.vllm.kernels import FlashKernel

        device, self.version = torch.device("cuda", 0), get_flash_attn_version()
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*size: int) -> Tensor:
            found = torch.empty(size, dtype=torch.bfloat16, device=device)
            return found.normal_(generator=generator)

        self.length, self.head_dim = length, shape.head_dim
        width = -(-length // PAGE)
        count = requests * width + 1
        self.cache = draw(count, shape.kv_heads, PAGE, 2 * shape.head_dim)
        tables = 1 + torch.randperm(count - 1, generator=generator, device=device)
        # As wide as the engine's, which admits longer requests.
        self.tables = torch.zeros(requests, -(-longest // PAGE), dtype=torch.int32, device=device)
        self.tables[:, :width] = tables.view(requests, width)
        self.last_pages = self.tables[:, width - 1].long()
        self.lengths = torch.full((requests,), length, dtype=torch.int32, device=device)
        # Among keys and values, as a layer's projection leaves it.
        self.query = draw(requests, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        self.query = self.query[:, : shape.heads]
        self.output = torch.empty(self.query.shape, dtype=self.query.dtype, device=device)
        self.starts = torch.arange(requests + 1, dtype=torch.int32, device=device)
        self.impl = SimpleNamespace(
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_size=shape.head_dim,
            scale=shape.head_dim**-0.5,
            vllm_flash_attn_version=self.version,
        )
        self.kernel, selector = FlashKernel(), DecodeSelector(**DECODE)
        view = self.kernel.view(None, self.cache, selector.unit)
        assert isinstance(view, CacheView)
        self.view = view
        self.summaries = PageSummaries.create(view.pages, PAGE, unit=selector.unit)
        self.summaries.update(torch.arange(count * PAGE, device=device))
        self.space = DecodeSpace.create(
            selector,
            torch.zeros_like(self.output),
            kv_heads=shape.kv_heads,
            units=self.tables.shape[1] * (PAGE // selector.unit),
        )
        self.rows = DecodeRows(
            lengths=self.lengths,
            tables=self.tables,
            tokens=slice(0, requests),
            is_behind=follows_keys(requests, shape.kv_heads),
        )
        # As vLLM's builder makes it for a graph of decoding.
        self.schedule = None
        if self.version == 3:
            self.schedule = get_scheduler_metadata(
                batch_size=requests,
                max_seqlen_q=1,
                max_seqlen_k=length,
                num_heads_q=shape.heads,
                num_heads_kv=shape.kv_heads,
                headdim=shape.head_dim,
                cache_seqlens=self.lengths,
                qkv_dtype=torch.bfloat16,
                cu_seqlens_q=self.starts,
                page_size=PAGE,
                causal=True,
                window_size=(-1, -1),
                num_splits=32,
            )

    def attend_parent(self) -> None:
        """The parent's attention."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        at = self.head_dim
        # [pages, P, Hkv, D], as the parent hands them over.
        key, value = (self.cache.transpose(1, 2)[..., i : i + at] for i in (0, at))
        flash_attn_varlen_func(
            q=self.query,
            k=key,
            v=value,
            out=self.output,
            cu_seqlens_q=self.starts,
            max_seqlen_q=1,
            seqused_k=self.lengths,
            max_seqlen_k=self.length,
            softmax_scale=self.impl.scale,
            causal=True,
            window_size=[-1, -1],
            block_table=self.tables,
            scheduler_metadata=self.schedule,
            fa_version=self.version,
            num_splits=32 if self.version == 3 else 0,
        )

    def attend_sparse(self, rows: DecodeRows) -> None:
        """Choice and attention of rows that the layers share, over this layer's pages."""
        from unisparse_flex.integrations.vllm.decode_rows import attend_decode

        attend_decode(
            self.impl,
            None,
            self.kernel,
            self.view,
            self.summaries,
            self.space,
            rows,
            self.query,
            self.output,
        )

    def choose(self, *, is_behind: bool = False) -> None:
        """The choice, without attention."""
        from unisparse_flex.integrations.vllm.decode_rows import choose

        rows = replace(self.rows, is_behind=is_behind)
        choose(self.impl, self.view, self.summaries, self.space, rows, self.query)


def time_graph(function: Callable[[], None]) -> float:
    """Microseconds of what a graph replays, the median of some."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(4):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / 4)
    return median(times)
