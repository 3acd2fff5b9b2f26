"""What a mask makes the host launch, once a forward: kernels and PyTorch's operators, counted."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from unisparse_flex import UniSparse
from unisparse_flex.block_masks import BlockGeometry
from unisparse_flex.block_masks.kernels import mask_reading, mask_tables, operator
from unisparse_flex.passes import SparseConfig
from unisparse_flex.passes.attend import alignment, mask_contents
from unisparse_flex.passes.calls import SdpaCall

from .calls import CPU
from .interpreter import Kernels

LENGTH = 90
CONFIG = SparseConfig(
    selector=UniSparse(block_size=16, c_q=4, c_k=4, sampled_queries=2, top_k=3), min_length=0
)
# What launches nothing.
FREE = {
    *("view", "expand", "select", "slice", "unsqueeze", "transpose", "detach", "alias"),
    *("empty", "new_empty", "empty_strided", "empty_like"),
}


class Work(TorchDispatchMode):
    """Counts operators by name, but those inside of interpreted kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name not in FREE:
            self.operators[name] += 1
        return func(*args, **kwargs or {})


class Unrecorded:
    """In the place of recordings: everything is done anew, and so counted."""

    def run(self, kind: Any, inputs: Any, compute: Callable[[], Sequence[Tensor]]) -> Any:
        return compute()


@pytest.fixture
def work(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Work:
    """Masks are read, turned and made into tables as on a GPU."""
    counted = Work()
    launch = kernels.launch.Launch.__call__

    def count(self: Any, *arguments: Any, **constants: Any) -> None:
        counted.kernels[self._kernel.fn.__name__] += 1
        with _disable_current_modes():
            launch(self, *arguments, **constants)

    for name in ("intervals", "read", "turn"):
        module = getattr(kernels, name)
        monkeypatch.setitem(sys.modules, f"{operator.__package__}.{name}", module)
    monkeypatch.setattr(kernels.launch.Launch, "__call__", count)
    for module in (mask_reading, mask_tables):
        monkeypatch.setattr(module, "_recordings", Unrecorded())
    monkeypatch.setattr(operator, "KERNELS", "cpu")
    monkeypatch.setattr(operator, "keys_obstacle", lambda _: None)
    # The counter is itself a mode, which says that somebody watches.
    monkeypatch.setattr(operator, "_is_plain", lambda _: True)
    monkeypatch.setattr(mask_reading, "_reads", lambda _: True)
    monkeypatch.setattr(alignment, "runs_mask_kernels", lambda _: True)
    monkeypatch.setattr(mask_contents, "DEVICE", "cpu")
    monkeypatch.setattr(mask_contents, "_known", type(mask_contents._known)())
    mask_tables.share_logs(4, CPU)
    return counted


ROW, KEY = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
CAUSAL = KEY <= ROW
# Kernels, and operators beside them: the highest of what the parts of a mask found.
MASKS: dict[str, tuple[Tensor, int, int]] = {
    "ones": (CAUSAL, 4, 1),
    "padding": (CAUSAL & (KEY >= 21), 9, 1),
    "padding of a batch": (CAUSAL & (torch.tensor([0, 21])[:, None, None] <= KEY)[:, None], 9, 1),
    "documents": (CAUSAL & (ROW // 20 == KEY // 20), 7, 1),
    "a window": (CAUSAL & (ROW - KEY < 30), 4, 1),
}


@pytest.mark.parametrize("name", MASKS)
def test_an_eager_call_launches_little_for_its_mask(work: Work, name: str) -> None:
    mask, kernels, operators = MASKS[name]
    batch = mask.shape[0] if mask.dim() == 4 else 1
    query = torch.zeros(batch, 2, LENGTH, 16)
    for seen in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        call = SdpaCall(query=query, key=query, value=query, attn_mask=seen)
        # How a formula is turned is found out once.
        mask_contents.read_call(replace(call, attn_mask=seen.clone()), CONFIG)
        work.kernels.clear()
        work.operators.clear()
        with work:
            assert mask_contents.read_call(call, CONFIG) is not None
            # Layers of the same model: nothing anew.
            assert mask_contents.read_call(call, CONFIG) is not None
        assert work.kernels.total() <= kernels, work.kernels
        assert work.operators.total() <= operators, work.operators


IDS = (torch.arange(LENGTH) // 20).expand(2, -1).contiguous()
VALID = torch.tensor([[0], [21]]) <= KEY
TEXTS: dict[str, tuple[str, list[Tensor], int, int]] = {
    "padding": ("(t0[b, kv]) & (t1[b, q])", [VALID, VALID], 4, 0),
    "a window": ("q < kv + 30", [], 3, 0),
    "first keys": ("t0[b, q] <= kv", [IDS], 3, 0),
    "documents": ("t0[b, q] == t0[b, kv]", [IDS], 3, 1),
    "padded documents": ("(t0[b, q] == t0[b, kv]) & (t1[b, kv])", [IDS, VALID], 4, 1),
}


@pytest.mark.parametrize("name", TEXTS)
def test_tables_take_few_launches(work: Work, name: str) -> None:
    text, tensors, kernels, operators = TEXTS[name]
    geometry = BlockGeometry(q_len=LENGTH, kv_len=LENGTH, block_size=16, causal_offset=0)
    sizes = {"c_q": 4, "c_k": 4, "sampled_queries": 2, "sink_blocks": 1, "last_query_blocks": 1}
    with work:
        mask_tables.tables_of_mask(
            text, tensors, (), geometry=geometry, batch=2, device=CPU, **sizes
        )
    assert work.kernels.total() <= kernels, work.kernels
    assert work.operators.total() <= operators, work.operators


def test_what_is_known_of_a_mask_is_of_one_kind_of_call(work: Work) -> None:
    query = torch.zeros(1, 2, LENGTH, 16)
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(~MASKS["padding"][0], -torch.inf)
    call = SdpaCall(query=query, key=query, value=query, attn_mask=mask)
    known = mask_contents.read_call(call, CONFIG)
    assert known is not None
    again = mask_contents.read_call(replace(call, scale=0.5), CONFIG)
    assert again is not None
    assert again[0].scale == 0.5
    assert again[0].mask == known[0].mask
    assert mask_contents.read_call(replace(call, dropout_p=0.1), CONFIG) is None
    assert mask_contents.read_call(replace(call, is_causal=True), CONFIG) is None
    assert mask_contents.read_call(replace(call, query=query[:, :, :8]), CONFIG) is None
    longer = torch.zeros(1, 2, LENGTH + 8, 16)
    assert mask_contents.read_call(replace(call, key=longer, value=longer), CONFIG) is None
    assert work.kernels.total() == MASKS["padding"][1] + 5
    mask.requires_grad_()
    assert mask_contents.read_call(call, CONFIG) is None
