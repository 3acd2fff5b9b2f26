"""The benchmark of serving: its engines, its gate, its ratios and its tables; vLLM is made up."""

from __future__ import annotations

import json
import re
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import registry
from bench.serve import decoding, describe, measure
from bench.serve.engines import LLAMA, TINY, Client, Server
from bench.serve.setup import SHARE, Bench, blocks_for

ROOT = Path(__file__).parents[2]


class Engine:
    """One token a step for each request, the first after ``prefill`` steps."""

    def __init__(self, logprob: float = -1.0, prefill: int = 1) -> None:
        self.llm_engine = self
        self.waiting: deque[Any] = deque()
        self.running: list[Any] = []
        self.aborted: list[str] = []
        self.logprob, self.prefill = logprob, prefill

    def add_request(self, name: str, prompt: dict[str, Any], wanted: Any) -> None:
        tokens = len(prompt["prompt_token_ids"])
        self.waiting.append(SimpleNamespace(name=name, tokens=tokens, wanted=wanted, steps=0))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names
        self.running = [each for each in self.running if each.name not in names]

    def step(self) -> list[Any]:
        self.running += self.waiting
        self.waiting.clear()
        outputs = []
        for each in self.running:
            each.steps += 1
            tokens = each.steps - self.prefill + 1
            if tokens < 1:
                continue
            logprobs = [{7: SimpleNamespace(logprob=self.logprob)}]
            outputs.append(
                SimpleNamespace(
                    request_id=each.name,
                    finished=tokens == each.wanted.max_tokens,
                    outputs=[SimpleNamespace(logprobs=logprobs)],
                )
            )
        done = {output.request_id for output in outputs if output.finished}
        self.running = [each for each in self.running if each.name not in done]
        return outputs


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = SimpleNamespace(SamplingParams=lambda **given: SimpleNamespace(**given))
    monkeypatch.setitem(sys.modules, "vllm", made_up)


def bench(tmp_path: Path, **changes: Any) -> Bench:
    values: dict[str, Any] = {
        "shape": TINY,
        "folder": tmp_path,
        "parent": None,
        "prompt": 1536,
        "chunks": (512,),
        "whole": 512,
        "small": 64,
        "many": 3,
        "answer": 4,
        "lengths": 3,
        "decoding": ((3, 64, 2), (1, 512, 3)),
    }
    return Bench(**{**values, **changes})


def serving(monkeypatch: pytest.MonkeyPatch, **by_side: Any) -> None:
    """Has the cases meet these engines instead; what is an error is raised at the start."""

    @contextmanager
    def serve(server: Server) -> Iterator[Any]:
        found = by_side["parent" if server.settings is None else "sparse"]
        if isinstance(found, Exception):
            raise found
        yield found

    monkeypatch.setattr(measure, "serve", serve)
    monkeypatch.setattr(decoding, "serve", serve)
    taken = {"summaries_bytes": 1, "cache_bytes": 256}
    monkeypatch.setattr(measure, "memory_row", lambda *_: taken)
    monkeypatch.setattr(decoding, "summaries_row", lambda *_: taken)


@pytest.mark.parametrize("blocks", [1, 7, 64, 768])
def test_a_tenth_of_a_causal_grid_is_kept(blocks: int) -> None:
    def share(count: int) -> float:
        kept = sum(min(row, count) for row in range(1, blocks + 1))
        return kept / sum(range(1, blocks + 1))

    nearest = min(range(1, blocks + 1), key=lambda count: abs(share(count) - SHARE))
    assert blocks_for(blocks) == nearest


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("parent", [None, "TRITON_ATTN"])
def test_the_two_engines_differ_in_the_plug_in_alone(
    tmp_path: Path, parent: str | None, graphs: bool
) -> None:
    sides = bench(tmp_path, parent=parent).sides(512, {"min_length": 0}, graphs=graphs)
    ours, theirs = (sides[side].options() for side in ("sparse", "parent"))
    own = {"min_length": 0} | ({} if parent is None else {"parent": parent})
    assert ours.pop("additional_config") == {"unisparse": own}
    if parent is not None:
        assert ours.pop("attention_config") == {"backend": "CUSTOM"}
        assert theirs.pop("attention_config") == {"backend": parent}
    assert ours == theirs
    assert ours["dtype"] == "float32"
    assert ("compilation_config" in ours) == graphs != ("enforce_eager" in ours)


def test_the_configuration_is_that_of_the_model(tmp_path: Path) -> None:
    config = json.loads((LLAMA.save(tmp_path, 4096) / "config.json").read_text())
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"] == 4096
    assert config["num_key_value_heads"] == 8
    assert config["max_position_embeddings"] == 4096


def test_a_client_waits_for_the_first_token_and_repeats_its_prompts() -> None:
    engine = Engine(prefill=3)
    client = Client(engine, 512)
    assert client.prompt(40, 1) == Client(Engine(), 512).prompt(40, 1) != client.prompt(40, 2)
    assert client.first_token(40) > 0
    assert not engine.has_unfinished_requests()
    names = [client.add(client.prompt(9, seed), 2) for seed in range(3)]
    assert sorted(output.request_id for output in client.drain()) == sorted(names)


@pytest.mark.parametrize(("logprob", "passed"), [(-1.0, True), (-1.00005, True), (-1.001, False)])
def test_the_gate_compares_log_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logprob: float, passed: bool
) -> None:
    serving(monkeypatch, parent=Engine(), sparse=Engine(logprob))
    [row] = measure.measure_gate(bench(tmp_path))
    assert row["passed"] is passed
    assert row["compared"] == len(row["prompts"])
    assert row["largest_difference"] == pytest.approx(-1.0 - logprob)


def test_a_gate_without_answers_has_not_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving(monkeypatch, parent=Engine(), sparse=RuntimeError("no room"))
    [row] = measure.measure_gate(bench(tmp_path))
    assert row["passed"] is False
    assert row["errors"] == {"sparse": "RuntimeError: no room"}


def test_nothing_is_measured_once_answers_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving(monkeypatch, parent=Engine(), sparse=Engine(-2.0))
    monkeypatch.setattr(measure, "vllm_version", lambda: "0.0.0")
    output = tmp_path / "serve.json"
    measure.main(["--cases", "gate,first-token", "--output", str(output)])
    found = json.loads(output.read_text())
    assert [row["case"] for row in found["rows"]] == ["gate"]
    assert "are not the parent's" in found["stopped"]


def test_first_tokens_are_compared_in_chunks_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving(monkeypatch, parent=Engine(), sparse=Engine())
    rows = list(measure.measure_first_token(bench(tmp_path)))
    assert [(row["prompt"], row["chunk"]) for row in rows] == [(1536, 512), (512, 512)]
    for row in rows:
        middle = measure.REPEATS // 2
        assert row["ratio"] == pytest.approx(row["parent_ms"][middle] / row["sparse_ms"][middle])


def test_an_engine_that_does_not_start_leaves_its_error_and_no_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving(monkeypatch, parent=Engine(), sparse=RuntimeError("no room"))
    for case in (measure.measure_first_token, measure.measure_batch, measure.measure_beside):
        for row in case(bench(tmp_path)):
            assert row["errors"] == {"sparse": "RuntimeError: no room"}
            assert not any("ratio" in name for name in row)


def test_latency_is_that_of_steps_in_which_all_decode(tmp_path: Path) -> None:
    client = Client(Engine(prefill=2), 512)
    total, latency = measure.run_batch(client, bench(tmp_path))
    assert 0 < latency < total


def test_a_prompt_beside_decoding_ends_with_its_first_token(tmp_path: Path) -> None:
    engine = Engine()
    beside, alone = measure.run_beside(Client(engine, 512), bench(tmp_path, answer=64))
    assert len(alone) == 16
    assert len(beside) == 1
    assert not engine.has_unfinished_requests()
    assert len(engine.aborted) == 8


def test_prompts_of_many_lengths_end_inside_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving(monkeypatch, parent=Engine(), sparse=Engine())
    [row] = measure.measure_lengths(bench(tmp_path, lengths=4))
    lengths = [found["prompt"] for found in row["lengths"]]
    assert len(set(lengths)) == 4
    assert all(length % 128 for length in lengths)
    for side in ("parent", "sparse"):
        assert len(row[f"{side}_first_over_second"]) == 4
        assert all(len(found[f"{side}_ms"]) == 2 for found in row["lengths"])


RESULT: dict[str, Any] = {
    "model": "M",
    "layers": 8,
    "weights": "random",
    "dtype": "bfloat16",
    "vllm": "0.0.0",
    "parent": "FLASH_ATTN",
    "device": "GPU",
    "command": ["python", "-m", "bench.serve"],
    "rows": [
        {"case": "gate", "compared": 32, "largest_difference": 0.01, "passed": True},
        {
            "case": "first-token",
            "prompt": 98304,
            "chunk": 8192,
            "density": 0.1,
            "parent_ms": [900.0, 1000.0, 1200.0],
            "sparse_ms": [390.0, 400.0, 410.0],
            "ratio": 2.5,
            "means_bytes": 1,
            "cache_bytes": 256,
            "parent_peak_bytes": 2**20,
            "sparse_peak_bytes": 4 * 2**20,
        },
        {"case": "first-token", "prompt": 98304, "chunk": 2048, "errors": {"sparse": "E"}},
        {
            "case": "lengths",
            "lengths": [{"prompt": 1}, {"prompt": 2}],
            "compiled_while_warming_up": {"a": 2},
            "compiled_afterwards": {},
            "sparse_first_over_second": [1.0, 1.5],
            "parent_first_over_second": [1.0, 1.2],
        },
        {
            "case": "batch",
            "prompt": 4096,
            "requests": 32,
            "sparse_rows": 0,
            "parent_tokens_per_second": [1000.0],
            "sparse_tokens_per_second": [990.0],
            "tokens_per_second_ratio": 0.99,
            "parent_latency_ms": [4.0],
            "sparse_latency_ms": [4.02],
            "latency_ms_ratio": 1.005,
        },
        {
            "case": "beside",
            "prompt": 98304,
            "chunk": 8192,
            "parent_beside_ms": [100.0, 120.0, 200.0],
            "sparse_beside_ms": [50.0, 60.0, 70.0],
            "median_ratio": 0.5,
        },
        {
            "case": "needle",
            "text": "prose",
            "depth": 0.2,
            "prompt": 8128,
            "chunk": 2048,
            "density": 0.3,
            "parent_found": True,
            "sparse_found": True,
            "same_tokens": False,
        },
    ],
}


def test_every_case_has_its_table() -> None:
    text = describe(RESULT, "serve-made-up.json")
    assert text.startswith("serve-made-up.json: the shape of M, 8 layers, random weights, bfloat16")
    for line in (
        "| 32 | 0.01 | True |",
        "| 98304 | 8192 | 10% | 1000 | 400 | 2.50 | 0.391% | 3 |",
        "| 98304 | 2048 |  |  |  |  |  |  |",
        "| 2 | 2 | 0 | 1.25 | 1.50 | 1.10 | 1.20 |",
        "| 4096 | 32 | 0 | 1000 | 990 | 0.990 | 4 | 4.02 | 1.005 |",
        "| 98304 | 8192 | 120 | 60 | 0.50 | 200 | 70 |",
        "| prose | 20% | 8128 | 2048 | 30% | yes | yes | no |",
    ):
        assert line in text
    real = describe(RESULT | {"weights": "real"}, "serve-made-up.json")
    assert real.startswith("serve-made-up.json: M, 8 layers, real weights")


def test_every_file_has_its_tables_on_the_page_of_serving() -> None:
    page = (ROOT / "docs/serving.md").read_text()
    named = re.findall(r"<!-- tables of (\S+) -->", page)
    assert sorted(named) == [path.name for path in registry.files_of("serve")]


def test_steps_in_which_all_decode_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = {"parent": Engine(prefill=3), "sparse": Engine(prefill=2)}
    serving(monkeypatch, **engines)
    rows = list(decoding.measure_decode(bench(tmp_path)))
    found = [(row["requests"], row["prompt"], row["layers"]) for row in rows]
    assert found == [(3, 64, 2), (1, 512, 3)]
    for row in rows:
        assert len(row["parent_step_ms"]) == len(row["sparse_step_ms"]) == decoding.STEPS
        assert row["ratio"] > 0
        assert "decode_density" in row
        assert row["summaries_bytes"] == 1
    assert len(engines["parent"].aborted) == 4
    assert not list(decoding.measure_decode_attention(bench(tmp_path)))
