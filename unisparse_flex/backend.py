"""``torch.compile(model, backend="unisparse")``: Inductor after the pass, for any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from .block_masks import DEFAULT_SELECTOR
from .passes import SparseConfig, rewrite_sdpa
from .passes.calls import read_selector


def unisparse(
    gm: fx.GraphModule,
    example_inputs: list[Tensor],
    *,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Dynamo backend that makes the attention of a model that was not optimized sparse.

    Attention calls of an optimized model keep the settings that `optimize` gave them.

    Args:
        gm: The graph that Dynamo captured.
        example_inputs: Its inputs.
        options: ``selector`` and ``min_length`` as in `optimize`, but for calibrations; everything
            else is an Inductor option, as with the default backend.

    Returns:
        The compiled graph.
    """
    from torch._inductor.compile_fx import compile_fx

    inductor_options = dict(options or {})
    selector = inductor_options.pop("selector", None) or DEFAULT_SELECTOR
    if isinstance(selector, str):
        selector = read_selector(selector)
    config = SparseConfig.of_model(selector, min_length=inductor_options.pop("min_length", None))
    rewrite_sdpa(gm, config)
    compiled: Any = compile_fx(gm, example_inputs, config_patches=inductor_options or None)
    return compiled
