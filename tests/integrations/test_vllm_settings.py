"""The vLLM plug-in without vLLM: settings, refusals, the split of a batch, counts and report."""

from __future__ import annotations

import importlib
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from unisparse_flex import Calibration, Selector, UniSparse
from unisparse_flex.block_masks.pages import DecodeSelector
from unisparse_flex.integrations.vllm import (
    ENTRY_POINT,
    GROUP,
    TESTED,
    Options,
    Reason,
    registration,
)
from unisparse_flex.integrations.vllm.cache_view import (
    CacheView,
    has_dtype,
    view_packed,
    view_transposed,
)
from unisparse_flex.integrations.vllm.counters import Counting
from unisparse_flex.integrations.vllm.kernels import FlashKernel
from unisparse_flex.integrations.vllm.layer_state import LayerState
from unisparse_flex.integrations.vllm.layers import (
    excluded_layers,
    local_setting,
    refuse_engine,
    refuse_layer,
    setting_of,
    validate_calibration,
)
from unisparse_flex.integrations.vllm.planning import Plan, plan_rows, refuse_batch
from unisparse_flex.integrations.vllm.policy import Policy
from unisparse_flex.integrations.vllm.report import describe
from unisparse_flex.integrations.vllm.versions import validate_version
from unisparse_flex.integrations.vllm.warm_up import row_lengths
from unisparse_flex.passes.calls import HeadShard
from unisparse_flex.passes.decision import CallShape
from unisparse_flex.passes.decision.cost_forecast import Forecast
from unisparse_flex.selectors import DenseSpan, StreamingLLM

# Of a layer with the heads of Llama-3.1-8B.
POLICY = Policy(
    selectors=Policy.count([UniSparse()]),
    min_length=None,
    q_heads=32,
    kv_heads=8,
    head_dim=128,
    dtype=torch.bfloat16,
    device=torch.device("cpu"),
)

NAME = "model.layers.{}.self_attn.attn"


def impl(**changes: Any) -> Any:
    """vLLM's implementation of a plain layer, as far as it is asked."""
    plain: dict[str, Any] = {
        "attn_type": "decoder",
        "kv_sharing_target_layer_name": None,
        "sliding_window": (-1, -1),
        "alibi_slopes": None,
        "logits_soft_cap": 0,
        "sinks": None,
        "kv_cache_dtype": "auto",
        "num_heads": 8,
        "num_kv_heads": 2,
    }
    return SimpleNamespace(**{**plain, **changes})


def calibration(layers: Mapping[str, Selector] = MappingProxyType({})) -> Calibration:
    return Calibration(
        layers={"model.layers.0.self_attn": "dense", **layers},
        quality="recall",
        target=0.9,
        reached=0.9,
        density=0.5,
        model="LlamaForCausalLM",
        unisparse_flex="0.1.0",
        torch="2.11.0",
    )


class TestOptions:
    def test_nothing_given_is_the_default(self) -> None:
        assert Options.read({}) == Options()
        assert Options().selector == UniSparse()

    def test_names_are_those_of_the_library(self, tmp_path: Path) -> None:
        path = tmp_path / "calibration.json"
        calibration().save(path)
        found = Options.read(
            {
                "calibration": str(path),
                "min_length": 4096,
                "dense_layers": [0, -1],
                "parent": "TRITON_ATTN",
            }
        )
        assert found.calibration == calibration()
        assert (found.min_length, found.dense_layers, found.parent) == (
            4096,
            (0, -1),
            "TRITON_ATTN",
        )
        assert Options.read({"selector": "UniSparse(top_k=7)"}).selector == UniSparse(top_k=7)
        assert Options.read({"selector": "fast"}) == Options.read({"quality": "fast"})
        assert Options.read({"selector": "paper"}).selector == UniSparse.paper()

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            (3, TypeError, "must be a mapping"),
            ({"top_k": 3}, ValueError, r"must have names of .*got \['top_k'\]"),
            ({"selector": 3}, TypeError, "selector's text or a quality"),
            ({"selector": "rm()"}, ValueError, "selector must be one of"),
            ({"selector": "UniSparse(top_p=2.0)"}, ValueError, r"top_p must be in \(0, 1\]"),
            ({"quality": "best"}, ValueError, "quality must be one of"),
            ({"quality": "fast", "selector": "high"}, ValueError, "must not be given together"),
            ({"min_length": -1}, ValueError, "min_length"),
            ({"dense_layers": 3}, TypeError, "dense_layers must be a list"),
            ({"dense_layers": ["a"]}, TypeError, "dense_layers must be integers"),
            ({"parent": "FLASHINFER"}, ValueError, "parent must be one of"),
            ({"untested_version": "yes"}, TypeError, "must be true or false"),
            ({"log_seconds": 0}, ValueError, "log_seconds must be a number above 0"),
            ({"calibration": "/nowhere.json"}, OSError, "nowhere"),
            ({"calibration": 3}, TypeError, "path of a file"),
        ],
    )
    def test_what_is_wrong_is_named(self, given: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            Options.read(given)


class TestVersions:
    @pytest.mark.parametrize("version", [*TESTED, "0.32.0+cpu"])
    def test_those_that_were_tested_pass(self, version: str) -> None:
        validate_version(version, untested_version=False)

    def test_another_is_refused_with_a_way_out(self) -> None:
        with pytest.raises(RuntimeError, match=r"0\.26\.0, 0\.32\.0, got 0\.99\.0.*untested_ver"):
            validate_version("0.99.0", untested_version=False)
        validate_version("0.99.0", untested_version=True)


class TestLayers:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({}, None),
            ({"sliding_window": None}, None),
            ({"sliding_window": -1}, None),
            ({"sliding_window": (127, 0)}, Reason.SLIDING_WINDOW),
            ({"chunk_lookback": 1}, Reason.SLIDING_WINDOW),
            ({"attn_type": "encoder_only"}, Reason.NOT_DECODER),
            ({"kv_sharing_target_layer_name": "other"}, Reason.SHARED_CACHE),
            ({"alibi_slopes": torch.ones(8)}, Reason.ALIBI),
            ({"logits_soft_cap": 30.0}, Reason.SOFT_CAP),
            ({"sinks": torch.ones(8)}, Reason.SINKS),
            ({"kv_cache_dtype": "fp8"}, Reason.QUANTIZED_CACHE),
            ({"num_heads": 6}, Reason.HEADS),
        ],
    )
    def test_what_is_not_plain_is_refused(
        self, changes: dict[str, Any], reason: Reason | None
    ) -> None:
        assert refuse_layer(impl(**changes), UniSparse(c_h=2)) is reason

    def test_selectors_of_whole_prompts_are_refused(self) -> None:
        span = DenseSpan(selector=UniSparse(), tokens="0:64")
        assert refuse_layer(impl(), span) is Reason.SELECTOR

    @pytest.mark.parametrize(
        ("sizes", "transfer", "reason"),
        [
            ({}, None, None),
            ({"decode_context_parallel_size": 2}, None, Reason.CONTEXT_PARALLEL),
            ({"prefill_context_parallel_size": 2}, None, Reason.CONTEXT_PARALLEL),
            ({"tensor_parallel_size": 4, "pipeline_parallel_size": 2}, None, None),
            ({}, object(), Reason.KV_TRANSFER),
        ],
    )
    def test_engines_are_refused_where_caches_are_shared(
        self, sizes: dict[str, int], transfer: object, reason: Reason | None
    ) -> None:
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(**sizes), kv_transfer_config=transfer
        )
        assert refuse_engine(config) is reason

    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_a_rank_has_the_numbers_of_its_own_heads(self, count: int) -> None:
        thresholds = tuple(i / 100 for i in range(8))
        whole = UniSparse(head_thresholds=thresholds)
        found: list[float] = []
        for rank in range(count):
            setting = local_setting(whole, HeadShard(index=rank, count=count), 8 // count)
            assert isinstance(setting, UniSparse)
            assert setting.head_thresholds is not None
            found += setting.head_thresholds
        assert tuple(found) == thresholds
        shard = HeadShard(index=count - 1, count=count)
        assert local_setting(UniSparse(), shard, 8 // count) == UniSparse()
        assert local_setting(Reason.EXCLUDED, shard, 8 // count) is Reason.EXCLUDED

    def test_numbers_for_other_heads_than_the_models_are_refused(self) -> None:
        whole = UniSparse(head_thresholds=(0.1,) * 6)
        with pytest.raises(ValueError, match="each of 8 query heads, got 6"):
            local_setting(whole, HeadShard(index=1, count=2), 4)

    def test_groups_of_composite_heads_are_counted_on_the_rank(self) -> None:
        # Key heads fewer than ranks are repeated: a rank's group is smaller than the model's.
        selector = UniSparse(c_h=4)
        assert refuse_layer(impl(num_heads=8, num_kv_heads=2), selector) is None
        assert refuse_layer(impl(num_heads=4, num_kv_heads=1), selector) is None
        assert refuse_layer(impl(num_heads=2, num_kv_heads=1), selector) is Reason.HEADS

    def test_dense_layers_count_from_either_end(self) -> None:
        assert excluded_layers(Options(dense_layers=(0, -1)), 8) == {0, 7}
        with pytest.raises(ValueError, match=r"dense_layers must be in \[-8, 8\)"):
            excluded_layers(Options(dense_layers=(8,)), 8)

    def test_each_layer_of_a_calibration_has_its_own_setting(self) -> None:
        own = UniSparse(top_k=5)
        options = Options(calibration=calibration({"model.layers.1.self_attn": own}))
        settings = [setting_of(NAME.format(i), i, options, frozenset({3})) for i in range(4)]
        assert settings == [Reason.CALIBRATED, own, Reason.CALIBRATED, Reason.EXCLUDED]
        # Of a model that is part of another, or that was calibrated without its head.
        whole = setting_of("language_model." + NAME.format(1), 1, options, frozenset())
        assert whole == setting_of("layers.1.self_attn.attn", 1, options, frozenset()) == own

    def test_a_calibration_of_another_model_is_refused(self) -> None:
        options = Options(calibration=calibration())
        validate_calibration(options, [NAME.format(0), NAME.format(1)])
        validate_calibration(Options(), ["blocks.0.attention"])
        with pytest.raises(ValueError, match="calibration must name layers of the model"):
            validate_calibration(options, ["blocks.0.attention"])

    def test_a_calibration_of_fewer_layers_or_other_heads_is_told(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        sizes = {"layers": 1, "num_attention_heads": 4, "head_dim": 64}
        options = Options(calibration=replace(calibration(), sizes=sizes))
        alike = {"num_attention_heads": 4, "head_dim": 64, "num_hidden_layers": 1}
        validate_calibration(options, [NAME.format(0)], alike)
        assert caplog.text == ""
        names = [NAME.format(i) for i in range(3)]
        validate_calibration(options, names, alike | {"num_attention_heads": 8})
        assert "one of LlamaForCausalLM for a model with num_attention_heads=8" in caplog.text
        assert f"(it says 4), {NAME.format(1)!r} and 2 layers in all" in caplog.text


def plan(*rows: tuple[int, int], prefilling: list[bool] | None = None, **options: Any) -> Plan:
    """A batch of rows of so many queries and keys."""
    starts = [0]
    for queries, _ in rows:
        starts.append(starts[-1] + queries)
    given: dict[str, Any] = {"min_queries": 128, "decide": lambda q, k: None, "budget": 10**6}
    return plan_rows(starts, [keys for _, keys in rows], prefilling, **{**given, **options})


class TestPlanning:
    def test_the_ends_of_prompts_are_rows_that_may_be_their_last(self) -> None:
        rows = [(1, 900), (200, 200), (40, 1000), (16, 500), (128, 640)]
        prefilling = [True, True, True, False, True]
        assert [r.index for r in plan(*rows, prefilling=prefilling).ends] == [1, 2, 4]
        assert [r.length for r in plan((400, 400), budget=400).ends] == [400]
        assert [r.length for r in plan((400, 6400), budget=400).ends] == [6400]
        assert plan((400, 6401), budget=400).ends == ()
        assert plan((400, 6401), budget=400, threshold=400).ends == ()
        assert [r.length for r in plan((300, 6401), budget=400).ends] == [6401]
        dense = plan(*rows, prefilling=prefilling, decide=lambda q, k: Reason.FEW_KEYS)
        assert [r.index for r in dense.ends] == [1, 2, 4]

    @pytest.mark.parametrize(
        ("changes", "prefix", "reason"),
        [
            ({}, 0, None),
            ({}, 64, Reason.CASCADE),
            ({"causal": False}, 0, Reason.NOT_CAUSAL),
            ({"causal": torch.tensor([True])}, 0, Reason.NOT_CAUSAL),
            ({"mm_req_doc_ranges": {0: [(3, 9)]}}, 0, Reason.PREFIX_IMAGES),
            ({"rswa_prefix_lens": torch.tensor([5])}, 0, Reason.PREFIX_IMAGES),
            ({"seq_lens_cpu_upper_bound": None}, 0, Reason.SPLIT_BATCH),
        ],
    )
    def test_batches_that_are_not_plain_are_refused(
        self, changes: dict[str, Any], prefix: int, reason: Reason | None
    ) -> None:
        plain: dict[str, Any] = {
            "causal": True,
            "mm_req_doc_ranges": None,
            "rswa_prefix_lens": None,
            "seq_lens_cpu_upper_bound": torch.tensor([300]),
        }
        assert refuse_batch(SimpleNamespace(**{**plain, **changes}), prefix) is reason

    def test_prefill_rows_are_split_from_all_others(self) -> None:
        found = plan(
            (1, 900), (500, 500), (4, 80), (0, 0), (200, 4000), (128, 128),
            prefilling=[False, True, False, False, True, False],
            decide=lambda queries, keys: Reason.SHORT if keys < 1000 else None,
        )  # fmt: skip
        [sparse] = found.sparse
        assert (sparse.index, sparse.start, sparse.stop, sparse.length) == (4, 505, 705, 4000)
        assert [row.index for row in found.rest] == [0, 1, 2, 5]
        assert found.reasons == Counter({Reason.DECODE: 2, Reason.SHORT: 1, Reason.VERIFICATION: 1})

    @pytest.mark.parametrize(
        ("rows", "options", "cut"),
        [
            ([(512, 512)], {"budget": 512}, [True]),
            ([(512, 512)], {"budget": 513}, [False]),
            ([(1, 90), (511, 900)], {"budget": 512}, [True]),
            ([(256, 256), (256, 256)], {"budget": 512}, [False, False]),
            ([(256, 256), (200, 300)], {"threshold": 256}, [True, False]),
        ],
    )
    def test_a_row_is_cut_where_the_scheduler_ran_out_of_tokens(
        self, rows: list[tuple[int, int]], options: dict[str, Any], cut: list[bool]
    ) -> None:
        assert [row.is_cut for row in plan(*rows, **options).sparse] == cut

    @pytest.mark.parametrize("ranks", [2, 4])
    def test_a_rank_decides_by_the_heads_that_it_has(self, ranks: int) -> None:
        rank = replace(POLICY, q_heads=32 // ranks, kv_heads=8 // ranks)
        lengths = [128 * 2**n for n in range(10)]
        decided = [[policy.decide(n, n) for n in lengths] for policy in (POLICY, rank)]
        for reasons in decided:
            assert reasons[0] is Reason.SLOWER
            assert reasons[-1] is None
        # Fewer heads gain nothing earlier.
        assert decided[1].count(None) <= decided[0].count(None)

    def test_min_length_or_the_cost_model_decides(self) -> None:
        selectors = Policy.count([UniSparse(), UniSparse(), UniSparse(top_k=4)])
        stated = replace(POLICY, selectors=selectors, min_length=1000)
        assert stated.decide(500, 999) is Reason.SHORT
        assert stated.decide(500, 1000) is None
        assert stated.selectors == ((UniSparse(), 2), (UniSparse(top_k=4), 1))
        assert stated.min_queries == 128
        asked = replace(POLICY, selectors=selectors)
        assert asked.decide(128, 128) is Reason.SLOWER
        assert asked.decide(8192, 200_000) is None

    def test_rows_of_which_nearly_all_would_be_read_are_the_parents(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        few, most, fewest = selectors = UniSparse(), UniSparse(top_k=4), UniSparse(top_k=9)
        densities: dict[Selector, float] = dict(zip(selectors, (0.8, 0.98, 0.1), strict=True))
        fast = 2000

        def predict(shape: CallShape, selector: Selector) -> Forecast:
            return Forecast(
                dense_seconds=3.0,
                select_seconds=0.5,
                attend_seconds=1.0 if shape.kv_len >= fast else 3.0,
                density=densities[selector],
            )

        monkeypatch.setattr("unisparse_flex.integrations.vllm.policy.forecast", predict)

        def decide(length: int, *selectors: Selector) -> Reason | None:
            # Heads of no model: what was decided is cached.
            policy = replace(POLICY, selectors=Policy.count(selectors), head_dim=7)
            return policy.decide(length, length)

        assert decide(fast, few) is None
        assert decide(fast, most) is Reason.KEEPS_MOST
        # What all layers together would read, not the worst of them.
        assert decide(fast, most, fewest) is None
        assert decide(fast, most, most, few) is Reason.KEEPS_MOST
        assert decide(fast - 1, most) is Reason.SLOWER


class TestViews:
    @pytest.mark.parametrize("heads_inside", [False, True])
    @pytest.mark.parametrize("heads", [1, 2])
    def test_pages_of_one_head_are_numbered_as_the_steps_say(
        self, heads: int, heads_inside: bool
    ) -> None:
        shape = (5, 16, heads, 8) if heads_inside else (5, heads, 16, 8)
        cache = torch.randn(shape)
        cache = cache.transpose(1, 2) if heads_inside else cache
        view = view_packed(cache)
        assert isinstance(view, CacheView)
        for page in range(5):
            for head in range(heads):
                number = page * view.steps[0] + head * view.steps[1]
                assert torch.equal(view.key[number, :, 0], cache[page, head, :, :4])
                assert torch.equal(view.value[number, :, 0], cache[page, head, :, 4:])
        assert view.key.data_ptr() == view.pages.data_ptr() == cache.data_ptr()

    @pytest.mark.parametrize("heads_inside", [False, True])
    @pytest.mark.parametrize("heads", [1, 3])
    def test_units_of_pages_are_numbered_as_the_steps_say(
        self, heads: int, heads_inside: bool
    ) -> None:
        shape = (5, 16, heads, 8) if heads_inside else (5, heads, 16, 8)
        cache = torch.randn(shape)
        cache = cache.transpose(1, 2) if heads_inside else cache
        view = view_packed(cache, 4)
        assert isinstance(view, CacheView)
        assert view.unit == 4
        for page, head, unit in product(range(5), range(heads), range(4)):
            at = page * view.steps[0] + head * view.steps[1] + unit * view.steps[2]
            rows = slice(unit * 4, unit * 4 + 4)
            assert torch.equal(view.key[at, :, 0], cache[page, head, rows, :4])
            assert torch.equal(view.value[at, :, 0], cache[page, head, rows, 4:])

    def test_other_layouts_are_refused(self) -> None:
        cache = torch.randn(5, 2, 16, 8)
        assert view_packed(cache.mT) is Reason.LAYOUT
        assert view_packed(cache[..., 0]) is Reason.LAYOUT
        assert view_packed(torch.randn(5, 2, 16, 12)[..., :7]) is Reason.LAYOUT
        assert view_transposed(cache.transpose(1, 2)) is Reason.LAYOUT

    def test_caches_of_other_dtypes_are_refused(self) -> None:
        cache = torch.zeros(1, dtype=torch.float16)
        assert has_dtype(cache, torch.float16)
        assert not has_dtype(cache, torch.bfloat16)
        assert not has_dtype(cache.view(torch.uint8), torch.uint8)


class TestLayerState:
    def bind(self, cache: torch.Tensor, selector: UniSparse, dtype: Any = None) -> LayerState:
        state = LayerState.create("a", impl(), FlashKernel(), selector)
        state.bind(None, cache, dtype or cache.dtype)
        return state

    def test_a_cache_is_met_once(self) -> None:
        cache = torch.randn(4, 2, 64, 32)
        state = LayerState.create("a", impl(), FlashKernel(), UniSparse())
        state.bind(None, torch.empty(0), cache.dtype)
        assert not state.is_bound
        state.bind(None, cache, cache.dtype)
        summaries = state.summaries
        assert summaries is not None
        assert summaries.means.shape == (4, 2, 1, 16)
        state.bind(None, cache, cache.dtype)
        assert state.summaries is summaries
        state.bind(None, torch.randn(6, 2, 64, 32), cache.dtype)
        assert state.summaries is not summaries

    def test_decoding_has_units_and_summaries_of_them(self) -> None:
        decode = DecodeSelector(budget=512)
        state = LayerState.create("a", impl(), FlashKernel(), UniSparse(), decode=decode)
        cache = torch.randn(4, 2, 64, 32)
        state.bind(None, cache, cache.dtype)
        assert state.summaries is not None
        assert state.units is not None
        assert state.summaries.units is not None
        # A mean and deviations of each unit.
        assert state.summaries.units.numbers.shape == (4, 2, 64 // 32, 2, 16)
        assert state.units.unit == 32
        small = LayerState.create("a", impl(), FlashKernel(), UniSparse(), decode=decode)
        small.bind(None, torch.randn(4, 2, 32, 32), cache.dtype)
        assert small.summaries is not None
        assert (small.units, small.decode, small.summaries.units) == (None, None, None)

    @pytest.mark.parametrize(
        ("shape", "dtype", "reason"),
        [
            ((4, 2, 256, 32), torch.float32, Reason.PAGE_SIZE),
            ((4, 2, 64, 32), torch.bfloat16, Reason.DTYPE),
            ((4, 2, 64), torch.float32, Reason.LAYOUT),
        ],
    )
    def test_what_cannot_be_read_is_refused(
        self, shape: tuple[int, ...], dtype: torch.dtype, reason: Reason
    ) -> None:
        state = self.bind(torch.randn(shape), UniSparse(), dtype)
        assert (state.reason, state.selector, state.is_bound) == (reason, None, True)
        state.written(torch.tensor([0]))

    def test_a_refused_layer_needs_no_cache(self) -> None:
        state = LayerState.create("a", impl(sinks=torch.ones(8)), FlashKernel(), UniSparse())
        assert (state.reason, state.is_bound) == (Reason.SINKS, True)
        assert LayerState.create("a", impl(), FlashKernel(), Reason.EXCLUDED).is_bound


class TestReport:
    def states(self) -> list[LayerState]:
        sparse = [
            LayerState.create(str(i), impl(), FlashKernel(), selector)
            for i, selector in enumerate((UniSparse(top_k=4), StreamingLLM()))
        ]
        for state in sparse:
            state.bind(None, torch.randn(4, 2, 64, 32), torch.float32)
        windowed = impl(sliding_window=(5, 0))
        return [*sparse, LayerState.create("2", windowed, FlashKernel(), UniSparse())]

    def test_it_says_what_runs_and_what_does_not_and_why(self) -> None:
        text = describe(self.states(), Options(), "FLASH_ATTN", None)
        assert "prefill of 2 of 3 layers sparse over FLASH_ATTN" in text
        assert "1 layer stays with FLASH_ATTN: sliding window" in text
        assert "1 layer: UniSparse(top_k=4)" in text
        assert "cost model" in text
        assert "pages of 64 keys" in text
        assert "0.78% of the cache" in text
        assert "StreamingLLM reads keys that lie in one piece" in text
        assert "at least 512 keys" in describe(self.states(), Options(min_length=512), "A", None)

    def test_an_engine_that_runs_nothing_sparse_says_why(self) -> None:
        text = describe(self.states(), Options(), "FLASH_ATTN", Reason.KV_TRANSFER)
        assert text == f"unisparse: everything stays with FLASH_ATTN: {Reason.KV_TRANSFER}"


def test_the_log_says_how_much_ran_sparse() -> None:
    counting = Counting()
    assert counting.next_line(0.001) is None
    counting.sparse_rows, counting.sparse_tokens, counting.visible_blocks = 2, 900, 40
    counting.dense_rows[Reason.SHORT] = 3
    counting.kept_on(torch.device("cpu")).add_(10)
    line = counting.next_line(0.001)
    assert line is not None
    assert "2 prefill rows of 900 tokens sparse, 10 of 40 blocks read (25.0%)" in line
    assert "3 SHORT" in line
    assert counting.next_line(0.001) is None
    counting.reset()
    counts = counting.read()
    assert (counts.sparse_rows, counts.kept_blocks, counts.dense_rows) == (0, 0, {})
    assert counts.density == 0


def test_rows_of_the_warm_up_reach_the_longest_request() -> None:
    assert row_lengths(8192, 131072, 128) == [
        (128, 32768), (128, 65536), (128, 131072),
        (8192, 32768), (8192, 65536), (8192, 131072),
    ]  # fmt: skip
    assert row_lengths(8192, 2000, 128) == [(128, 2000), (2000, 2000)]


def test_the_plug_in_is_registered_by_the_names_that_it_says() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    points = project["project"]["entry-points"][GROUP]
    [(name, path)] = points.items()
    module, function = path.split(":")
    assert name == ENTRY_POINT
    assert getattr(importlib.import_module(module), function) is registration.register


def test_the_extra_installs_what_was_tested() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    [extra] = project["project"]["optional-dependencies"]["vllm"]
    specifiers = Requirement(extra).specifier
    releases = [*(f"0.{minor}.0" for minor in range(20, 40)), "0.27.1", "0.32.1"]
    assert tuple(version for version in releases if version in specifiers) == TESTED


def test_refusals_are_told_from_settings_and_lengths() -> None:
    choices = [reason for reason in Reason if not reason.is_refusal]
    assert {Reason.SHORT, Reason.KEEPS_MOST, Reason.EXCLUDED, Reason.DECODE} <= set(choices)
    assert Reason.SINKS.is_refusal
    assert Reason.CASCADE.is_refusal
