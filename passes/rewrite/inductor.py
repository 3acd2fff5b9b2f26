"""The pass inside torch.compile: one permanent, stateless dispatcher among Inductor's passes."""

from __future__ import annotations

import hashlib
import inspect
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

from ... import block_masks
from ...block_masks.selectors import Selector
from ..attend import widen_tiles
from ..calls import SDPA_TARGETS
from ..masks import given_identity
from .all_dense import warn_of_dense
from .graph import guard_given, may_decode, rewrite_sdpa, settings_in

CONFIG_KEY = "pre_grad_custom_pass"


class SparseAttentionPass(CustomGraphPass):
    """Lowers marker nodes; every other graph passes untouched.

    Settings stand in the nodes, so one instance serves every model and its identity in cache
    keys is that of the sources.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrites ``graph`` in place."""
        settings, decodes = settings_in(graph), may_decode(graph)
        if settings:
            # Of a GPU's graph too: it costs nothing, and where its tensors are is not known yet.
            widen_tiles()
        warn_of_dense(rewrite_sdpa(graph, None, lower=True), settings, may_decode=decodes)

    def uuid(self) -> Any:
        """Identity in Inductor's cache keys; ``None``, no caching, where a source is unknown."""
        identity = _identity()
        return None if identity is None else (*identity, *given_identity(_examine))

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseAttentionPass:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SparseAttentionPass, ()


class ChainedPass(CustomGraphPass):
    """A pass that was there before, then ours; for releases that take one pass only."""

    def __init__(self, first: Any) -> None:
        self.first = first

    def __call__(self, graph: fx.Graph) -> None:
        """Runs both on ``graph`` in place."""
        self.first(graph)
        SparseAttentionPass()(graph)

    def uuid(self) -> Any:
        """Identity in Inductor's cache keys; ``None``, no caching, where the first has none."""
        first, ours = getattr(self.first, "uuid", lambda: None)(), SparseAttentionPass().uuid()
        return None if first is None or ours is None else (first, ours)


def _examine(graph: fx.Graph) -> None:
    """Looks at what Dynamo traced, of which a cache may have the compiled graph."""
    report = guard_given(graph)
    if report is not None:
        warn_of_dense(report, settings_in(graph))


def _identity() -> tuple[str, ...] | None:
    """What decides what a marker becomes: our sources, torch's, those of a user's selectors."""
    try:
        own = {inspect.getfile(selector) for selector in Selector.registry.values()}
        return (_library_hash(), *(_file_hash(name) for name in sorted(own)))
    except (OSError, TypeError):
        return None


@cache
def _library_hash() -> str:
    passes = Path(__file__).parents[1]
    folders = passes, Path(block_masks.__file__).parent
    sources = sorted(path for folder in folders for path in folder.rglob("*.py"))
    hashes = " ".join(_file_hash(str(source)) for source in sources)
    return hashlib.sha256(f"{torch.__version__} {hashes}".encode()).hexdigest()


@cache
def _file_hash(name: str) -> str:
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()


def install() -> None:
    """Puts the pass among Inductor's pre-grad passes, beside whatever stands there. Idempotent.

    A pass that someone assigns later replaces it; markers then run their own kernel, which
    computes the same without graph-level rewrites.
    """
    _list_attention_as_overridable()
    current = getattr(inductor_config, CONFIG_KEY)
    if _holds_ours(current):
        return
    if current is None:
        ours = SparseAttentionPass()
        # Overrides are per context: only the default reaches compilations in other threads.
        inductor_config._config[CONFIG_KEY].default = ours  # type: ignore[attr-defined]
        if _holds_ours(getattr(inductor_config, CONFIG_KEY)):
            return
        setattr(inductor_config, CONFIG_KEY, ours)
    elif isinstance(current, (list, tuple)):
        setattr(inductor_config, CONFIG_KEY, [*current, SparseAttentionPass()])
    else:
        setattr(inductor_config, CONFIG_KEY, ChainedPass(current))


def _list_attention_as_overridable() -> None:
    """Makes Dynamo show every spelling of SDPA to function modes.

    torch lists once what they see, by the public names as they are then: after a patch of SDPA's
    the function itself would not be among them, and its operator never is.
    """
    listed = torch.overrides.get_overridable_functions()[torch.nn.functional]
    listed += [target for target in SDPA_TARGETS if target not in listed]


def _holds_ours(value: Any) -> bool:
    passes = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(p, (SparseAttentionPass, ChainedPass)) for p in passes)
