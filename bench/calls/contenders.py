"""Dense and block-sparse attention as functions without arguments, compiled once per shape."""

from __future__ import annotations

import importlib.util
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from unisparse_flex import UniSparse, attention
from unisparse_flex.block_masks import BlockGeometry, BlockSelection, causal_mask_mod, default_scale
from unisparse_flex.block_masks.kernels import select_lists, settings_of
from unisparse_flex.passes.decision import supports_head_dim

from .stages import SELECTOR, Heads, create_inputs, dense

SHAPES = {
    "llama3-8b": Heads(query=32, key=8, head_dim=128),
    "qwen3-8b": Heads(query=32, key=8, head_dim=128),
    "smollm2": Heads(query=9, key=3, head_dim=64),
    "mha-64": Heads(query=16, key=16, head_dim=64),
    "wide-256": Heads(query=8, key=4, head_dim=256),
    "gemma3-270m": Heads(query=4, key=1, head_dim=256),
}
# Settings of the paper's policy, and the default beside them.
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "two": {"c_q": 16, "c_k": 16, "sampled_queries": 4},
}
DEFAULT = "default"
SETTING_NAMES = (DEFAULT, *SETTINGS)
OPTIONS: dict[str, dict[str, str]] = {"triton": {}, "flash": {"BACKEND": "FLASH"}}
# What each backend is called where it attends to every block.
DENSE_KERNELS = {"triton": "flex", "flash": "flash_attention_4"}

Lists = tuple[Tensor, Tensor, Tensor, Tensor]


def find_backends() -> list[str]:
    """Backends of flex_attention that are installed: ``flash`` is FlashAttention-4."""
    try:
        has_flash = importlib.util.find_spec("flash_attn.cute") is not None
    # Finding it imports the package around it, which may fail in any way.
    except Exception:
        has_flash = False
    return ["triton", *(["flash"] if has_flash else [])]


def takes(backend: str, heads: Heads) -> bool:
    """Whether the library would run these heads by ``backend``."""
    return backend != "flash" or supports_head_dim(heads.head_dim)


@dataclass(frozen=True)
class TopK:
    """A number of blocks per row, and the density that it gives."""

    count: int
    density: float


def at_density(name: str, tokens: int, density: float) -> tuple[UniSparse, TopK]:
    """Settings that keep about ``density`` of a causal prompt, and the ``top_k`` among them."""
    top = choose_top_k(-(-tokens // create_selector(name).block_size), density)
    return create_selector(name, top.count), top


def choose_top_k(blocks: int, density: float) -> TopK:
    """The ``top_k`` of `UniSparse` whose density on a causal grid is nearest to ``density``.

    First and diagonal block are kept in every row, everything in the last.
    """

    def share(count: int) -> float:
        seen = min(max(count, 2), blocks - 1)
        # Rows 1 to seen - 1 keep all of theirs, those after them seen blocks; then the last row.
        kept = seen * (seen + 1) // 2 + seen * (blocks - 1 - seen) + blocks
        return kept / (blocks * (blocks + 1) // 2)

    if blocks < 2:
        return TopK(1, 1.0)
    above = bisect_left(range(1, blocks), density, key=share) + 1
    count = min((above - 1, above), key=lambda k: abs(share(k) - density) if k else 2.0)
    return TopK(count, share(count))


def create_selector(name: str, top_k: int | None = None) -> UniSparse:
    """The settings of that name, with their own rule or ``top_k`` blocks a row."""
    if name == DEFAULT:
        return UniSparse(top_k=top_k)
    return UniSparse.paper(top_k=top_k, **SETTINGS[name])


def causal_lists(geometry: BlockGeometry, device: str) -> Lists:
    """Lists of all visible blocks, for one head."""
    visible = geometry.visible_blocks(torch.device(device))
    selection = BlockSelection(keep=visible[None, None], visible=visible, geometry=geometry)
    return selection.block_lists()


def compile_apart(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Compiles for fixed lengths, under a name of its own: Dynamo counts compilations by code."""
    function.__code__ = function.__code__.replace(co_name=name)
    return torch.compile(function, fullgraph=True, dynamic=False)


@dataclass
class Case:
    """One shape and length.

    Attributes:
        shape: A name in `SHAPES`.
        tokens: Queries and keys.
        device: ``cuda`` or ``cpu``.
        dtype: Dtype of the inputs.
        found: What was measured before and is needed again.
    """

    shape: str
    tokens: int
    device: str
    dtype: torch.dtype = torch.bfloat16
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> Heads:
        return SHAPES[self.shape]

    @cached_property
    def geometry(self) -> BlockGeometry:
        size = SELECTOR.block_size
        return BlockGeometry(
            q_len=self.tokens, kv_len=self.tokens, block_size=size, causal_offset=0
        )

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return create_inputs(self.heads, self.tokens, self.dtype, self.device)

    @cached_property
    def mask_mod(self) -> Any:
        return causal_mask_mod(self.geometry)

    @cached_property
    def attends(self) -> dict[str, Callable[..., Tensor]]:
        return {name: self._compile_attend(name) for name in OPTIONS}

    def use(self, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        """Takes these inputs instead of drawing some."""
        self.__dict__["inputs"] = inputs

    def close(self) -> None:
        """Gives the inputs back; what is compiled stays."""
        self.__dict__.pop("inputs", None)
        self.found.pop("dense_output", None)

    def _compile_attend(self, backend: str) -> Callable[..., Tensor]:
        options: Any = OPTIONS[backend] or None

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Any:
            return flex_attention(
                query, key, value, block_mask=mask, enable_gqa=True, kernel_options=options
            )

        return compile_apart(attend, self._name(f"attend_{backend}"))

    def _name(self, kind: str) -> str:
        return f"{kind}_{self.shape}_{self.tokens}".replace("-", "_")

    def attend(self, backend: str, lists: Lists) -> Tensor:
        """Attention over the listed blocks."""
        size = self.geometry.block_size
        mask = BlockMask.from_kv_blocks(
            *lists,
            BLOCK_SIZE=size,
            mask_mod=self.mask_mod,
            seq_lengths=(self.tokens, self.tokens),
            compute_q_blocks=False,
        )
        return self.attends[backend](*self.inputs, mask)

    def select(self, selector: UniSparse) -> Lists:
        """Block lists by the kernels."""
        query, key, _ = self.inputs
        lists = select_lists(
            query,
            key,
            settings_of(selector),
            geometry=self.geometry,
            scale=default_scale(query.shape[3]),
        )
        return lists.tensors()

    def compile_whole(self, selector: UniSparse) -> Callable[[], Tensor]:
        """`unisparse_flex.attention` under torch.compile, as a user calls it."""

        def whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention(query, key, value, is_causal=True, enable_gqa=True, selector=selector)

        run = compile_apart(whole, self._name(f"whole_{abs(hash(selector.text))}"))
        return lambda: run(*self.inputs)

    def dense_calls(self, backends: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
        """Every dense contender; `sdpa` is the default that others are compared with."""
        lists = causal_lists(self.geometry, self.device)
        calls: dict[str, Callable[[], Tensor]] = {"sdpa": lambda: dense(*self.inputs)}
        for kind in ("FLASH", "CUDNN"):
            calls[f"sdpa_{kind.lower()}"] = partial(self._dense_by, kind)
        for backend in backends:
            calls[DENSE_KERNELS[backend]] = partial(self.attend, backend, lists)
        return calls

    def _dense_by(self, kind: str) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, f"{kind}_ATTENTION")):
            return dense(*self.inputs)

    def dense_expanded(self) -> Callable[[], Tensor]:
        """cuDNN over keys and values that were repeated for every query head."""
        query, key, value = self.inputs
        group = self.heads.query // self.heads.key
        key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))

        def run() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return dense(query, key, value)

        return run

    def density(self, lists: Lists) -> float:
        """Listed blocks over visible ones, mean over heads."""
        blocks = self.geometry.num_q_blocks
        kept = lists[0].sum(dtype=torch.int64) + lists[2].sum(dtype=torch.int64)
        return float(kept) / (lists[0].shape[1] * blocks * (blocks + 1) // 2)


def relative_error(output: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm, head by head to save memory."""
    heads = range(exact.shape[1])
    wrong = sum((output[:, h].double() - exact[:, h].double()).square().sum() for h in heads)
    whole = sum(exact[:, h].double().square().sum() for h in heads)
    return float((torch.as_tensor(wrong) / torch.as_tensor(whole)).sqrt())


def exact_output(case: Case, selection: BlockSelection) -> Tensor:
    """Attention over a selection's blocks in float64."""
    query, key, value = (tensor.double() for tensor in case.inputs)
    mask = selection.token_mask()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def tail_error(case: Case, output: Tensor) -> float:
    """Relative error of the last query block, which keeps every key, in the last head.

    For lengths at which nothing dense is run.
    """
    query, key, value = (tensor[:, -1:].double() for tensor in case.inputs)
    rows = slice((case.geometry.num_q_blocks - 1) * case.geometry.block_size, case.tokens)
    position = torch.arange(case.tokens, device=query.device)
    mask = position[None, :] <= position[rows, None]
    exact = F.scaled_dot_product_attention(query[:, :, rows], key, value, attn_mask=mask)
    return relative_error(output[:, -1:, rows], exact)
