"""A vLLM backend that runs long rows sparse, over one that computes everything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...block_masks.pages import units_share
from ...passes.calls import HeadShard
from .counters import counting
from .decode_rows import DecodeRows, DecodeSpace, attend_decode, follows_keys
from .kernels import ParentKernel
from .layer_state import LayerState
from .layers import (
    excluded_layers,
    local_setting,
    refuse_engine,
    setting_of,
    validate_calibration,
)
from .options import KEY, Options
from .planning import Plan, Row, plan_rows, refuse_batch
from .policy import Policy
from .prompt_rows import pin_prompts, prompt_bytes
from .reasons import Reason
from .report import describe
from .settings import options_of
from .sparse_rows import SparseRows, attend_sparse, to_device, workspace_bytes
from .warm_up import warm_up

# Keys of all rows of a batch from which choosing their pages takes less time than it saves.
DECODE_KEYS = 16384


@dataclass(slots=True, eq=False)
class Split:
    """What a batch's metadata carry to the layers.

    Attributes:
        sparse: The sparse rows of prompts; ``None`` for none.
        decode: Rows that decode sparse; ``None`` for none.
        rest: The parent's metadata of the other rows; ``None`` for no rows.
        tokens: Which tokens these are: a range, or int64 [tokens].
        tables: int32 [requests, pages] of the whole batch.
        ends: Rows of prompts that end here, where decoding keeps what they look at.
    """

    sparse: SparseRows | None
    decode: DecodeRows | None
    rest: Any
    tokens: slice | Tensor | None
    tables: Tensor
    ends: tuple[Row, ...] = ()

    @property
    def is_dense(self) -> bool:
        """Whether the parent computes the whole batch, by its own metadata."""
        return self.sparse is None and self.decode is None


def create_backend(parent: Any, kernel: ParentKernel, *, needs_settings: bool = False) -> Any:
    """The backend over ``parent``.

    Args:
        parent: A vLLM backend whose kernel reads page tables.
        kernel: That kernel.
        needs_settings: Whether the backend does nothing where no settings are given.

    Returns:
        A class that derives from ``parent``.
    """
    from vllm.config import get_layers_from_vllm_config
    from vllm.logger import init_logger
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import AttentionCGSupport

    # A child of vLLM's logger: what is said reaches its log.
    logger = init_logger("vllm.unisparse_flex")
    parent_builder, parent_impl = parent.get_builder_cls(), parent.get_impl_cls()

    class Builder(parent_builder):  # type: ignore[misc, valid-type]
        """Plans every batch."""

        # A graph holds decoding alone: a prefill's control flow is Python's.
        _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        supports_update_block_table = False

        def __init__(
            self,
            kv_cache_spec: Any,
            layer_names: list[str],
            vllm_config: Any,
            device: torch.device,
            *args: Any,
            **kwargs: Any,
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs)
            self.options = options_of(vllm_config)
            self.refused = refuse_engine(vllm_config)
            if needs_settings and KEY not in (vllm_config.additional_config or {}):
                self.refused = Reason.NO_SETTINGS
            scheduler = vllm_config.scheduler_config
            self.budget = scheduler.max_num_batched_tokens
            self.threshold = scheduler.long_prefill_token_threshold or 0
            self.longest = vllm_config.model_config.max_model_len
            self.dtype = vllm_config.model_config.dtype
            self.layers = {
                name: layer
                for name, layer in get_layers_from_vllm_config(vllm_config, Attention).items()
                if name in layer_names and isinstance(layer.impl, Impl)
            }
            self.states = self._create_states(vllm_config)
            self.policy: Policy | None = None
            self.space: DecodeSpace | None = None
            self.decode_keys = DECODE_KEYS if self.options.min_length is None else 1
            self.requests = scheduler.max_num_seqs
            self.is_capturing = False
            # Requests of the batches that graphs hold.
            self.captured: set[int] = set()
            self.is_reported = False

        def _create_states(self, vllm_config: Any) -> dict[str, LayerState]:
            from vllm.distributed import get_tensor_model_parallel_rank
            from vllm.model_executor.models.utils import extract_layer_index

            shard = HeadShard(
                index=get_tensor_model_parallel_rank(),
                count=vllm_config.parallel_config.tensor_parallel_size,
            )
            text_config = vllm_config.model_config.hf_text_config
            excluded = excluded_layers(self.options, text_config.num_hidden_layers)
            validate_calibration(self.options, list(self.layers), vars(text_config))
            for name, layer in self.layers.items():
                if layer.impl.unisparse is not None:
                    # Builders of several micro-batches share the layers.
                    continue
                try:
                    index = extract_layer_index(name)
                except (AssertionError, ValueError):
                    index = None
                setting = self.refused or setting_of(name, index, self.options, excluded)
                setting = local_setting(setting, shard, layer.impl.num_heads)
                layer.impl.unisparse = LayerState.create(
                    name,
                    layer.impl,
                    kernel,
                    setting,
                    decode=self.options.decode,
                )
            return {name: layer.impl.unisparse for name, layer in self.layers.items()}

        @classmethod
        def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
            """The parent's, but no more than decoding."""
            found = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            return min(found, cls._cudagraph_support, key=lambda support: support.value)

        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
        ) -> Any:
            """The parent's metadata, with the split of a batch that has sparse rows."""
            common = common_attn_metadata
            metadata = super().build(common_prefix_len, common, fast_build)
            if self.refused is not None:
                self._report()
                return metadata
            policy = self._bind()
            # Of the batches before this one: their blocks are counted by now.
            line = counting.next_line(self.options.log_seconds)
            if line is not None:
                logger.info(line)
            if policy is None:
                return metadata
            if self.space is not None and common.max_query_len == 1:
                metadata.unisparse = self._decode(common, common_prefix_len)
                return metadata
            if common.max_query_len < policy.min_queries and self.space is None:
                return metadata
            found = self._plan(policy, common, common_prefix_len)
            if found is not None:
                metadata.unisparse = self._split(common, found)
            return metadata

        def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
            """As `build`; what a graph holds must do for every length."""
            self.is_capturing = True
            try:
                return super().build_for_cudagraph_capture(common_attn_metadata)
            finally:
                self.is_capturing = False

        def _bind(self) -> Policy | None:
            """Meets the caches; what is asked of rows, once they are known, if any is sparse."""
            if self.policy is not None:
                return self.policy if self.policy.selectors else None
            for name, state in self.states.items():
                layer = self.layers[name]
                state.bind(layer, layer.kv_cache, self.dtype)
            if not all(state.is_bound for state in self.states.values()):
                return None
            self._report()
            sparse = [s.selector for s in self.states.values() if s.selector is not None]
            impl = next(iter(self.layers.values())).impl if self.layers else None
            self.policy = Policy(
                selectors=Policy.count(sparse),
                min_length=self.options.min_length,
                q_heads=impl.num_heads if impl else 1,
                kv_heads=impl.num_kv_heads if impl else 1,
                head_dim=impl.head_size if impl else 1,
                dtype=self.dtype,
                device=torch.device(self.device),
            )
            self._create_space(impl)
            if torch.device(self.device).type == "cuda":
                warm_up(
                    [(self.layers[name], state) for name, state in self.states.items()],
                    self.budget,
                    self.longest,
                )
            return self.policy if sparse else None

        def _create_space(self, impl: Any) -> None:
            """Room for choosing units, where layers decode sparse."""
            found = [state for state in self.states.values() if state.units is not None]
            if not found:
                return
            decode, units = found[0].decode, found[0].units
            assert decode is not None
            assert units is not None
            page = units.pages.shape[2]
            shape = (self.requests, impl.num_heads, impl.head_size)
            self.space = DecodeSpace.create(
                decode,
                torch.zeros(shape, dtype=self.dtype, device=self.device),
                kv_heads=impl.num_kv_heads,
                units=(-(-self.longest // page) + 1) * (page // units.unit),
            )
            for state in found:
                state.space = self.space

        def _report(self) -> None:
            if not self.is_reported:
                self.is_reported = True
                states = list(self.states.values())
                logger.info(describe(states, self.options, kernel.name, self.refused))

        def _decode(self, common: Any, prefix: int) -> Split | None:
            """The split of a batch of rows that decode, all of them."""
            reason = refuse_batch(common, prefix)
            if self.is_capturing:
                self.captured.add(common.num_reqs)
            if reason is None or reason is Reason.SPLIT_BATCH:
                # A graph was recorded for requests of any length, and is replayed for these.
                most = common.num_reqs * self.longest
                if reason is None and common.num_reqs not in self.captured:
                    most = int(common.seq_lens_cpu_upper_bound[: common.num_reqs].sum())
                reason = Reason.FEW_KEYS if most < self.decode_keys else None
            # What a graph writes to is made for so many.
            assert common.num_reqs <= self.requests
            if reason is not None:
                counting.dense_rows[reason] += common.num_reqs
                return None
            if not self.is_capturing:
                counting.decode_rows += common.num_reqs
            rows = slice(0, common.num_reqs)
            tables = common.block_table_tensor
            decode = DecodeRows(
                lengths=common.seq_lens[rows],
                tables=tables[rows],
                tokens=rows,
                few=self._few_keys(common.num_reqs),
                is_behind=self._follows_keys(common.num_reqs),
            )
            return Split(None, decode, None, None, tables)

        def _few_keys(self, requests: int) -> int:
            """Keys of each of so many requests at which choosing takes as long as it saves."""
            return self.decode_keys // requests

        def _follows_keys(self, requests: int) -> bool:
            """Whether choosing for so many requests brings summaries up to date besides."""
            assert self.policy is not None
            return follows_keys(requests, self.policy.kv_heads)

        def _plan(self, policy: Policy, common: Any, prefix: int) -> Plan | None:
            count = common.num_reqs
            starts = common.query_start_loc_cpu[: count + 1].tolist()
            reason = refuse_batch(common, prefix)
            if reason is not None:
                long = [b - a >= policy.min_queries for a, b in pairwise(starts)]
                counting.dense_rows[reason] += sum(long)
                return None
            prefilling = common.is_prefilling
            plan = plan_rows(
                starts,
                common.seq_lens_cpu_upper_bound[:count].tolist(),
                None if prefilling is None else prefilling[:count].tolist(),
                min_queries=policy.min_queries,
                decide=policy.decide,
                budget=self.budget,
                threshold=self.threshold,
                decode_keys=None if self.space is None else self.decode_keys,
            )
            counting.dense_rows.update(plan.reasons)
            if not plan.sparse and not plan.decode and not self._ends_of(plan):
                return None
            counting.sparse_rows += len(plan.sparse)
            counting.sparse_tokens += sum(row.queries for row in plan.sparse)
            counting.decode_rows += len(plan.decode)
            return plan

        def _ends_of(self, plan: Plan) -> tuple[Row, ...]:
            """The ends of prompts of which decoding keeps what they look at."""
            decode = None if self.space is None else self.space.selector
            if decode is None or decode.keeps_all or not decode.prompt_share:
                return ()
            return tuple(row for row in plan.ends if row.length > decode.min_keys)

        def _split(self, common: Any, plan: Plan) -> Split:
            ends, tables = self._ends_of(plan), common.block_table_tensor
            if not plan.sparse and not plan.decode:
                return Split(None, None, None, None, tables, ends)
            device = common.query_start_loc.device
            tokens = _tokens_of(plan.rest, device)
            metadata = None
            if tokens is not None:
                # fast_build: the parent's buffer of a schedule holds that of the whole batch.
                metadata = super().build(0, _only(common, plan.rest, tokens), True)
            sparse = SparseRows(plan.sparse, device) if plan.sparse else None
            decode = None
            decoded = _tokens_of(plan.decode, device)
            if decoded is not None:
                index = to_device(torch.tensor([row.index for row in plan.decode]), device)
                decode = DecodeRows(
                    lengths=common.seq_lens[index],
                    tables=common.block_table_tensor[index],
                    tokens=decoded,
                    few=self._few_keys(len(plan.decode)),
                    is_behind=sparse is None
                    and metadata is None
                    and self._follows_keys(len(plan.decode)),
                )
            return Split(sparse, decode, metadata, tokens, tables, ends)

    class Impl(parent_impl):  # type: ignore[misc, valid-type]
        """Computes sparse rows, and has the parent compute the others."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.unisparse: LayerState | None = None
            self.reserved = _reserved_bytes(self)

        def do_kv_cache_update(
            self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
        ) -> None:
            """Writes the cache, then the summaries of what it was written to, or leaves these."""
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            if self.unisparse is not None:
                self.unisparse.bind(layer, kv_cache, key.dtype)
                if not self._is_behind(_metadata_of(layer)):
                    self.unisparse.written(slot_mapping)

        def _is_behind(self, metadata: Any) -> bool:
            """Whether `forward` brings the summaries up to date with the keys of a batch."""
            split, state = getattr(metadata, "unisparse", None), self.unisparse
            if split is None or split.decode is None or state is None or state.space is None:
                return False
            return bool(split.decode.is_behind) and state.reason is None

        def fused_rope_kvcache_supported(self) -> bool:
            """No: it writes the cache past `do_kv_cache_update`."""
            return False

        def fused_qk_norm_rope_kvcache_supported(self) -> bool:
            """No, as `fused_rope_kvcache_supported`."""
            return False

        def forward(
            self,
            layer: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            kv_cache: Tensor,
            attn_metadata: Any,
            output: Tensor,
            output_scale: Tensor | None = None,
            output_block_scale: Tensor | None = None,
            **more: Any,
        ) -> Tensor:
            """Attention of a batch."""
            split = getattr(attn_metadata, "unisparse", None)
            state = self.unisparse
            scales = (output_scale, output_block_scale)
            if attn_metadata is None and query.device.type == "cuda":
                # The engine measures its peak: a sparse batch's memory is to be part of it.
                torch.empty(self.reserved, dtype=torch.uint8, device=query.device)
            reason = None
            if split is not None and state is not None and not split.is_dense:
                reason = state.reason
                if any(scale is not None for scale in scales):
                    reason = Reason.QUANTIZED_OUTPUT
                if reason is not None:
                    counting.dense_calls[reason] += 1
                    if self._is_behind(attn_metadata):
                        state.written(attn_metadata.slot_mapping)
            if split is not None and state is not None and state.space is not None and split.ends:
                assert state.view is not None
                assert state.summaries is not None
                assert state.summaries.units is not None
                pin_prompts(
                    self,
                    state.view,
                    state.summaries.units,
                    state.space.selector,
                    split.ends,
                    split.tables,
                    query,
                )
            if split is None or state is None or reason is not None or split.is_dense:
                return super().forward(
                    layer, query, key, value, kv_cache, attn_metadata, output, *scales, **more
                )
            assert state.view is not None
            assert state.summaries is not None
            assert state.selector is not None
            if split.sparse is not None:
                attend_sparse(
                    self,
                    layer,
                    kernel,
                    state.view,
                    state.summaries.means,
                    state.selector,
                    split.sparse,
                    split.tables,
                    query,
                    output,
                )
            if split.decode is not None:
                at = split.decode.tokens
                assert state.space is not None
                assert state.units is not None
                with _part_of(output, at) as part:
                    attend_decode(
                        self,
                        layer,
                        kernel,
                        state.units,
                        state.summaries,
                        state.space,
                        split.decode,
                        query[at],
                        part,
                    )
            if split.rest is not None:
                at = split.tokens
                with _part_of(output, at) as part:
                    super().forward(
                        layer, query[at], key[at], value[at], kv_cache, split.rest, part, **more
                    )
            return output

    class Backend(parent):
        """The parent with sparse prefill and, where it is asked for, sparse decoding."""

        @staticmethod
        def get_name() -> str:
            """As it is selected."""
            return "CUSTOM"

        @staticmethod
        def get_impl_cls() -> type[Impl]:
            """See vLLM."""
            return Impl

        @staticmethod
        def get_builder_cls() -> type[Builder]:
            """See vLLM."""
            return Builder

        @classmethod
        def get_preferred_block_size(cls, default_block_size: int) -> int:
            """A page that is a key block, where the user states no other."""
            size = _preferred(default_block_size)
            supported = cls.supports_block_size(size)
            return size if supported else super().get_preferred_block_size(default_block_size)

    def _preferred(default: int) -> int:
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        if config is None:
            return Options().selector.block_size
        if needs_settings and KEY not in (config.additional_config or {}):
            return default
        return options_of(config).selector.block_size

    return Backend


def _reserved_bytes(impl: Any) -> int:
    """Memory of a sparse batch and of the summaries of all pages, at most."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is None or not torch.cuda.is_available():
        return 0
    options = options_of(config)
    size = options.selector.block_size
    model, cache = config.model_config, config.cache_config
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    most = int(total * getattr(cache, "gpu_memory_utilization", 1.0))
    # Keys are half of a cache; composite keys of a block one in so many.
    summaries = most // (2 * size)
    if options.decode is not None:
        summaries += int(most * units_share(options.decode.unit, impl.head_size))
        summaries += DecodeSpace.bytes(
            options.decode,
            rows=config.scheduler_config.max_num_seqs,
            q_heads=impl.num_heads,
            kv_heads=impl.num_kv_heads,
            head_dim=impl.head_size,
            length=model.max_model_len,
        )
        itemsize = model.dtype.itemsize
        summaries += prompt_bytes(model.max_model_len, impl.num_kv_heads, impl.head_size, itemsize)
    return summaries + workspace_bytes(
        config.scheduler_config.max_num_batched_tokens,
        model.max_model_len,
        impl.num_heads,
        impl.head_size,
        model.dtype.itemsize,
        size,
    )


def _tokens_of(rows: tuple[Row, ...], device: torch.device) -> slice | Tensor | None:
    """The tokens of rows: a range where they lie together."""
    if not rows:
        return None
    together = all(a.stop == b.start for a, b in pairwise(rows))
    if together:
        return slice(rows[0].start, rows[-1].stop)
    ranges = [torch.arange(row.start, row.stop) for row in rows]
    return to_device(torch.cat(ranges), device)


@contextmanager
def _part_of(output: Tensor, tokens: slice | Tensor) -> Iterator[Tensor]:
    """The rows of some tokens, to be written: in place where they lie together."""
    if isinstance(tokens, slice):
        yield output[tokens]
        return
    part = torch.empty_like(output[tokens])
    yield part
    output[tokens] = part


def _metadata_of(layer: Any) -> Any:
    """What the forward that runs says of the batch for a layer; ``None`` where it says nothing."""
    from vllm.forward_context import get_forward_context, is_forward_context_available

    found = get_forward_context().attn_metadata if is_forward_context_available() else None
    return found.get(layer.layer_name) if isinstance(found, dict) else None


def _only(common: Any, rows: tuple[Row, ...], tokens: slice | Tensor) -> Any:
    """The common metadata of some rows of a batch."""
    device = common.query_start_loc.device
    host = torch.tensor([row.index for row in rows])
    index = to_device(host, device)
    counts = torch.tensor([row.queries for row in rows], dtype=torch.int32)
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, out=starts[1:])

    def pick(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor[host if tensor.device.type == "cpu" else index]

    values: dict[str, Any] = {
        "query_start_loc": to_device(starts, device),
        "query_start_loc_cpu": starts,
        "seq_lens": pick(common.seq_lens),
        "seq_lens_cpu_upper_bound": pick(common.seq_lens_cpu_upper_bound),
        "is_prefilling": pick(common.is_prefilling),
        "num_reqs": len(rows),
        "num_actual_tokens": int(starts[-1]),
        "max_query_len": int(counts.max()),
        "max_seq_len": max(row.length for row in rows),
        "block_table_tensor": pick(common.block_table_tensor),
        "slot_mapping": common.slot_mapping[tokens],
        "positions": None if common.positions is None else common.positions[tokens],
        # What was made of the whole batch, or is read by no parent here.
        "req_idx": None,
        "_seq_lens_cpu": None,
        "_num_computed_tokens_cpu": None,
        "_num_computed_tokens_cache": None,
        "_token_to_req_indices_cache": None,
    }
    known = {field.name for field in fields(common)}
    return common.replace(**{name: value for name, value in values.items() if name in known})
