"""`torch.ops.unisparse.sdpa`: an attention call that carries its settings.

Dynamo, export and symbolic tracing record it as one node; the pass lowers that node. Where no
pass runs (eager, another backend, an exported module) its kernel does the same computation.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ..calls import (
    PER_HEAD,
    HeadShard,
    SdpaCall,
    SparseConfig,
    is_sharded,
    is_tracing,
    run_on_shards,
    shard_selector,
)
from ..decision import (
    DenseReason,
    flex_backend,
    flex_lowers,
    lacks_kernel_for_mask,
    needs_grad,
    refuse,
    refuse_sharding,
)
from .alignment import AlignedCall, align
from .decided_at_run import has_stated_range, implement, sdpa_at_run
from .first_output import proved
from .mask_contents import read_call
from .outcomes import count_outcome
from .region import compiled_in_loop, compiled_inline, compiled_once
from .shared_tokens import context_sdpa
from .sparse_attention import (
    apply_autocast,
    attend_flex,
    attend_masked,
    attend_masked_in_chunks,
    select,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...block_masks import BlockSelection

logger = logging.getLogger(__name__)

Observer = Callable[[SdpaCall, SparseConfig, "BlockSelection | None", "DenseReason | None"], None]
Lowering = Callable[[SdpaCall, SparseConfig], Tensor]
_observer: ContextVar[Observer | None] = ContextVar("unisparse_observer", default=None)
_as_compiled: ContextVar[bool] = ContextVar("unisparse_as_compiled", default=False)
_compiling = threading.local()
# Whether it was said of calls whose masks no kernel reads, and of others.
_said: set[bool] = set()
UNCOMPILED = (
    "sparse attention runs uncompiled: the same blocks, applied as a mask inside\n"
    "  dense attention, which is slower than dense attention alone%s; call\n"
    "  model.compile()"
)
# Measured without masks.
TIME_UNCOMPILED = " (on a CPU a\n  prefill of SmolLM2 takes 1.9 to 2.6 times as long)"
MASKED_UNCOMPILED = (
    "sparse attention runs uncompiled, under a mask that is a tensor (such as\n"
    "  padding) and that no kernel of a CPU reads: slower than dense attention; run\n"
    "  prompts of one length, or leave it dense (a model without min_length)"
)

_library = torch.library.Library("unisparse", "DEF")
_library.define(
    "sdpa(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, *, float? scale=None, bool enable_gqa=False, "
    "bool causal_lower_right=False, str mask='', Tensor[]? mask_tensors=None, "
    "SymInt[]? mask_numbers=None, Tensor[]? prepared=None, str config='') -> Tensor"
)


def marked_sdpa(call: SdpaCall, config: str) -> Tensor:
    """Runs or records the marker operator; on DTensors, on what this rank holds of them."""
    if is_sharded(call) and refuse_sharding(call) is None:
        return run_on_shards(call, lambda local, shard: _marked_shard(local, shard, config))
    return torch.ops.unisparse.sdpa(*call.positional(), **call.keywords(), config=config)


def computed_sdpa(call: SdpaCall, config: str) -> Tensor:
    """`marked_sdpa` where attention calls are not caught: without the operator if nobody sees it.

    The way through the dispatcher takes longer than all that is decided here.
    """
    if (
        is_tracing()
        # None is fake, then, nor holds what other ranks hold.
        or {type(call.query), type(call.key), type(call.value)} != {Tensor}
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return marked_sdpa(call, config)
    return _compute(call, SparseConfig.decode(config), plain=True)


def _marked_shard(call: SdpaCall, shard: HeadShard, config: str) -> Tensor:
    if shard.count > 1 and any(f"{field}=(" in config for field in PER_HEAD):
        config = _shard_config(config, shard.index, shard.count)
    return marked_sdpa(call, config)


@torch.compiler.assume_constant_result
def _shard_config(config: str, index: int, count: int) -> str:
    settings = SparseConfig.decode(config)
    selector = shard_selector(settings.selector, HeadShard(index=index, count=count))
    return replace(settings, selector=selector).encode()


def lowered_sdpa(
    *args: Any,
    config: str = "",
    body: str = "",
    prepared: Sequence[Tensor] = (),
    **kwargs: Any,
) -> Tensor:
    """What the pass puts in a marker's place: the sparse computation that Inductor compiles.

    Takes and returns what `torch.ops.unisparse.sdpa` does. Must be traced by AOTAutograd for
    Inductor: run eagerly, the flex operator inside would ignore the block lists. ``body`` is
    ``"body"`` or ``"loop"`` in those of a higher-order operator (`rewrite.LOOPED`); ``prepared``
    is what `prepared_mask` made of the call's mask.
    """
    lower = {"": compiled_once, "body": compiled_inline, "loop": compiled_in_loop}[body]
    call = SdpaCall.bind(args, kwargs)
    return _compute(call, SparseConfig.decode(config), lower, prepared)


@contextmanager
def observe_calls(observer: Observer, *, as_compiled: bool = False) -> Iterator[None]:
    """Calls ``observer(call, config, selection, reason)`` for every marker run eagerly inside.

    The observer sees real tensors; ``selection`` is ``None`` where the call stays dense, and
    ``reason`` then says why. A call with padding on the left is seen as it is computed, its rows
    turned (`AlignedCall`). Observers outside see the same calls, before it.

    Args:
        observer: See above.
        as_compiled: Reads mask tensors on every device and for every selector, so that calls are
            what a compiled model makes of them; without, nothing but the observer's time changes.
    """
    outer = _observer.get()

    def both(
        call: SdpaCall,
        config: SparseConfig,
        selection: BlockSelection | None,
        reason: DenseReason | None,
    ) -> None:
        if outer is not None:
            outer(call, config, selection, reason)
        observer(call, config, selection, reason)

    token = _observer.set(both)
    reads = _as_compiled.set(as_compiled or _as_compiled.get())
    try:
        yield
    finally:
        _as_compiled.reset(reads)
        _observer.reset(token)


def observer_in_force() -> Observer | None:
    """Who `observe_calls` made the observer of calls made here."""
    return _observer.get()


def is_watched() -> bool:
    """Whether `observe_calls` wants to know of calls made here."""
    return _observer.get() is not None


def _marker_kernel(
    *args: Any, config: str = "", prepared: Sequence[Tensor] | None = None, **kwargs: Any
) -> Tensor:
    call = SdpaCall.bind(args, kwargs)
    return _compute(call, SparseConfig.decode(config), prepared=prepared or ())


_library.impl("sdpa", _marker_kernel, "CompositeImplicitAutograd")


def _compute(
    call: SdpaCall,
    config: SparseConfig,
    lower: Lowering | None = None,
    prepared: Sequence[Tensor] = (),
    *,
    plain: bool = False,
) -> Tensor:
    """Runs or traces a call.

    ``lower`` is what Inductor compiles, where that is known to; ``prepared`` is what
    `prepare_mask` made of the mask, where it did; ``plain`` says that nothing is traced and that
    tensors are just that.
    """
    if not plain:
        if is_sharded(call) and refuse_sharding(call) is None:
            # A graph that was rewritten: what is caught in Python comes here on local tensors.
            return run_on_shards(call, lambda local, _: _compute(local, config, lower))
        call = call.with_constants()
    if config.context is not None:
        count_outcome(None)
        return context_sdpa(call, config)
    tracing = not plain and (lower is not None or is_traced(call))
    if not plain and lower is None and not config.strict and _asks_shape(call):
        # Only the output's shape is asked for: what is decided here would be a guard of the graph.
        return call.run_dense()
    given = call
    observer = None if tracing else _observer.get()
    if not tracing and (read := read_call(call, config, everywhere=_as_compiled.get())) is not None:
        call, prepared = read
    if tracing and not config.dense and has_stated_range(call, unknown=lower is None):
        return sdpa_at_run(apply_autocast(call), config)
    reason = refuse(call, config)
    if not tracing:
        count_outcome(reason)
    if reason is not None:
        if observer is not None:
            observer(call, config, None, reason)
        if config.strict:
            raise NotImplementedError(
                f"sparse attention cannot run this call: {reason} (query {_describe(call.query)}, "
                f"key {_describe(call.key)}); use F.scaled_dot_product_attention for it"
            )
        return given.run_dense()
    call = apply_autocast(call)
    if config.backend != "auto" and not (_asks_shape(call) and call.attn_mask is not None):
        # Also where no kernel is compiled: it was asked for by name. Of a mask whose graph is still
        # being recorded nothing is known.
        flex_backend(call, config.selector.block_size, config.backend)
    if observer is None and not tracing and _runs_compiled(call):
        return proved(run_compiled(call, config, prepared), call, config)
    aligned = align(call, config, traced=tracing, prepared=prepared)
    if aligned is not None:
        return aligned.restore(_run_sparse(aligned, config, lower, observer))
    if prepared:
        call = replace(call, mask_tensors=[*(call.mask_tensors or ()), *prepared])
    return _run_sparse(call, config, lower, observer)


def _run_sparse(
    call: SdpaCall, config: SparseConfig, lower: Lowering | None, observer: Observer | None
) -> Tensor:
    """Runs or traces a call that nothing refuses, on a grid of blocks from its first token."""
    if lower is not None and flex_lowers(call):
        return lower(call, config)
    selection = select(call, config)
    tracing = lower is not None or is_traced(call)
    if observer is not None:
        observer(call, config, selection, None)
    elif not tracing:
        _say_uncompiled(call, config)
    if not tracing:
        return attend_masked_in_chunks(call, selection)
    if call.query.device.type == "cuda" and flex_lowers(call):
        # Which backend will compile this is unknown here: one may interpret the flex operator.
        return attend_flex(call, selection, look_up=True)
    return attend_masked(call, selection)


def _say_uncompiled(call: SdpaCall, config: SparseConfig) -> None:
    """Logs that an eager call costs more than a dense one: once, and once of masked calls."""
    lacks_kernel = lacks_kernel_for_mask(call)
    if lacks_kernel in _said:
        return
    _said.add(lacks_kernel)
    if lacks_kernel and not isinstance(call, AlignedCall):
        # Compiled, it may be proved to be a formula that a kernel reads, such as a window.
        read = read_call(call, config, everywhere=True)
        lacks_kernel = read is None or lacks_kernel_for_mask(read[0])
    masked = call.attn_mask is not None or bool(call.mask)
    if lacks_kernel:
        logger.warning(MASKED_UNCOMPILED)
    else:
        logger.warning(UNCOMPILED, "" if masked else TIME_UNCOMPILED)


def _run_now(call: SdpaCall, config: SparseConfig) -> Tensor:
    """What `sdpa_at_run` does: as an eager call, and compiled wherever a kernel is."""
    known, prepared = read_call(call, config) or (call, [])
    if refuse(known, config) is None and flex_lowers(known):
        return run_compiled(known, config, prepared)
    return _compute(call, config)


implement(_run_now)


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


def is_traced(call: SdpaCall) -> bool:
    """Whether the call is being recorded into a graph rather than run."""
    if torch.compiler.is_compiling() or get_proxy_mode() is not None:
        return True
    return any(is_fake(tensor) for tensor in (call.query, call.key, call.value))


def _asks_shape(call: SdpaCall) -> bool:
    """Whether nothing is recorded of the call, nor computed: its tensors are fake."""
    return is_fake(call.query) and get_proxy_mode() is None


def _runs_compiled(call: SdpaCall) -> bool:
    """Whether an eager call goes through a compiled kernel: on CUDA, unless already inside one."""
    nested = getattr(_compiling, "active", False)
    return call.query.device.type == "cuda" and flex_lowers(call) and not nested


def run_compiled(call: SdpaCall, config: SparseConfig, prepared: Sequence[Tensor] = ()) -> Tensor:
    """Runs an eager call through the kernel that Inductor compiles for its kind, cached.

    Args:
        call: A call of real tensors that `decision.flex_lowers` accepts.
        config: Its settings, which must not keep it dense.
        prepared: What `prepare_mask` made of its mask, where it did.

    Returns:
        [B, Hq, Sq, Dv].
    """
    mask = call.attn_mask
    run = _compiled_sdpa(
        config.encode(),
        call.is_causal,
        # As text: Dynamo would make a number symbolic, and the kernel wants a constant.
        None if call.scale is None else repr(float(call.scale)),
        call.enable_gqa,
        call.causal_lower_right,
        call.mask,
        None if mask is None else mask.dtype,
        call.query.dtype,
        needs_grad(call),
        type(config.selector),
    )
    _compiling.active = True
    try:
        of_mask = (mask, call.mask_tensors, call.mask_numbers, list(prepared) or None)
        return run(call.query, call.key, call.value, *of_mask)
    finally:
        _compiling.active = False


@lru_cache(maxsize=256)
def _compiled_sdpa(
    config: str,
    is_causal: bool,
    scale: str | None,
    enable_gqa: bool,
    causal_lower_right: bool,
    mask: str,
    *_distinct: object,
) -> Callable[..., Tensor]:
    """The marker operator behind torch.compile, where the pass lowers it; one per kind of call."""

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        mask_tensors: Sequence[Tensor] | None,
        mask_numbers: Sequence[int] | None,
        prepared: Sequence[Tensor] | None,
    ) -> Tensor:
        return torch.ops.unisparse.sdpa(
            query,
            key,
            value,
            attn_mask,
            0.0,
            is_causal,
            scale=None if scale is None else float(scale),
            enable_gqa=enable_gqa,
            causal_lower_right=causal_lower_right,
            mask=mask,
            mask_tensors=mask_tensors,
            mask_numbers=mask_numbers,
            prepared=prepared,
            config=config,
        )

    # A code object of its own: Dynamo limits recompilations per code object.
    run.__code__ = run.__code__.replace(co_name="unisparse_sdpa")
    # A second length makes lengths dynamic: the first compilation can know more.
    return torch.compile(run, fullgraph=True)
