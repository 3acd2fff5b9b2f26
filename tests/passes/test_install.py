"""The pass among Inductor's passes: added once, beside what is there, with an identity."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

from tests.api.models import FINE, create, embeddings
from tests.api.reference import defined_output
from unisparse_flex import Selector, optimize
from unisparse_flex.passes import SparseAttentionPass
from unisparse_flex.passes.attend.marker import lowered_sdpa
from unisparse_flex.passes.rewrite.inductor import CONFIG_KEY, install

from .graphs import Calls, capture_dynamo, targets

TAKES_LISTS = int(torch.__version__.split(".")[1]) >= 13


class Recording(CustomGraphPass):
    """A pass that somebody else installed."""

    def __init__(self) -> None:
        self.graphs: list[fx.Graph] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.graphs.append(graph)

    def uuid(self) -> Any:
        return "recording"


@pytest.fixture
def assign() -> Iterator[Callable[[Any], None]]:
    """Assigns Inductor's pre-grad pass; what stood there before comes back."""
    before = current()
    yield lambda value: setattr(inductor_config, CONFIG_KEY, value)
    setattr(inductor_config, CONFIG_KEY, before)


@pytest.fixture
def registry() -> Iterator[dict[str, type[Selector]]]:
    before = dict(Selector.registry)
    yield Selector.registry
    Selector.registry.clear()
    Selector.registry.update(before)


def current() -> Any:
    return getattr(inductor_config, CONFIG_KEY)


def holds_ours(value: Any) -> bool:
    """Whether ``value``, called as Inductor would, lowers a marker."""
    graph = marked_graph()
    for one in value if isinstance(value, (list, tuple)) else (value,):
        one(graph.graph)
    return targets(graph) == [lowered_sdpa]


def marked_graph() -> fx.GraphModule:
    call = Calls(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    tensor = torch.zeros(1, 2, 64, 16)
    return capture_dynamo(optimize(call, FINE, min_length=0), tensor, tensor, tensor)


def test_installing_twice_changes_nothing() -> None:
    install()
    first = current()
    install()
    assert current() is first
    assert holds_ours(first)


def test_importing_the_package_installs() -> None:
    assert holds_ours(current())


def test_a_pass_that_was_there_still_runs(assign: Callable[[Any], None]) -> None:
    theirs = Recording()
    assign(theirs)
    install()
    assert holds_ours(current())
    assert len(theirs.graphs) == 1
    chained = current()
    install()
    assert current() is chained


def test_a_plain_function_that_was_there_still_runs(assign: Callable[[Any], None]) -> None:
    seen: list[fx.Graph] = []
    assign(seen.append)
    install()
    assert holds_ours(current())
    assert len(seen) == 1
    assert current().uuid() is None


def test_a_chain_is_known_by_both_its_passes(assign: Callable[[Any], None]) -> None:
    assign(Recording())
    install()
    assert current().uuid() == ("recording", SparseAttentionPass().uuid())


@pytest.mark.skipif(not TAKES_LISTS, reason="this torch takes one pass only")
def test_a_list_that_was_there_keeps_its_order(assign: Callable[[Any], None]) -> None:
    theirs = [Recording(), Recording()]
    assign(theirs)
    install()
    assert [*current()][:2] == theirs
    assert len(current()) == 3
    assert holds_ours(current())
    assert [len(one.graphs) for one in theirs] == [1, 1]
    install()
    assert len(current()) == 3


def test_other_threads_see_the_pass() -> None:
    install()
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(current()))
    thread.start()
    thread.join()
    assert isinstance(seen[0], SparseAttentionPass)


def test_where_another_pass_took_its_place_attention_is_still_sparse(
    assign: Callable[[Any], None],
) -> None:
    model, x = create(layers=1), embeddings(150)
    exact = defined_output(model, FINE, x)
    optimize(model, FINE, min_length=0)
    assign(Recording())
    with torch.no_grad():
        output = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=1e-5)


def test_copies_of_the_pass_are_the_pass() -> None:
    ours = SparseAttentionPass()
    assert copy.deepcopy(ours) is ours
    loaded = pickle.loads(pickle.dumps(ours))
    assert isinstance(loaded, SparseAttentionPass)
    assert loaded.uuid() == ours.uuid()


def test_the_identity_follows_the_selectors_that_are_defined(
    tmp_path: Path, registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = SparseAttentionPass().uuid()
    assert before is not None
    assert SparseAttentionPass().uuid() == before
    file = tmp_path / "own_selector.py"
    file.write_text("from tests.passes.graphs import Stripes\nclass Own(Stripes): pass\n")
    spec = importlib.util.spec_from_file_location("own_selector", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # inspect finds a class's file through its module.
    monkeypatch.setitem(sys.modules, "own_selector", module)
    spec.loader.exec_module(module)
    after = SparseAttentionPass().uuid()
    assert after is not None
    assert after != before
    registry.pop("Own")
    assert SparseAttentionPass().uuid() == before


def test_a_selector_without_a_source_turns_caching_off(registry: Any) -> None:
    exec("class Typed(Base): pass", {"Base": Selector, "__name__": "nowhere"})
    assert SparseAttentionPass().uuid() is None
