"""`sparse`: a model's attention is sparse inside a ``with`` block, and as before behind it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING

from torch import nn

from .block_masks import Selector
from .calibration import Calibration
from .catching import intercept, settings_of, split_fused_layers
from .optimization import ModelT, optimize, restore, validate_model
from .passes import SparseConfig

if TYPE_CHECKING:
    from .distributed import ContextParallel


@contextmanager
def sparse(
    model: ModelT,
    selector: Selector | Calibration | str | PathLike[str] | None = None,
    *,
    min_length: int | None = None,
    dense_layers: Collection[int] = (),
    backend: str = "auto",
    context: ContextParallel | None = None,
) -> Iterator[ModelT]:
    """`optimize` for the length of a ``with`` block; use it to try settings, or to compare.

    On the way out, an exception's too, every module has the settings again that it had on the way
    in: a plain model is plain, an optimized one keeps its own. So blocks nest, the innermost
    decides, and what `optimize` or `restore` did inside is undone. The model itself is changed: all
    threads that call it see it. What was compiled inside compiles anew outside.

    Args:
        model: As `optimize` takes it; of a diffusers pipeline, its transformer.
        selector: As `optimize` takes it.
        min_length: As `optimize` takes it.
        dense_layers: As `optimize` takes it.
        backend: As `optimize` takes it.
        context: As `optimize` takes it; to be named again where ``model`` has one.

    Yields:
        ``model``.

    Raises:
        TypeError: What `optimize` raises, with ``model`` left as it came.
        ValueError: The same, or ``model`` was optimized for tokens that ranks share and no
            ``context`` is given.
        OSError: The same.
    """
    validate_model(model)
    before = _settings(model)
    if context is None and any(SparseConfig.decode(config).context for config in before.values()):
        raise ValueError(
            "context must be given for a model that was optimized with one, got None: its ranks "
            "would attend to their own tokens alone; pass the same ContextParallel, or restore the "
            "model first"
        )
    try:
        yield optimize(
            model,
            selector,
            min_length=min_length,
            dense_layers=dense_layers,
            backend=backend,
            context=context,
        )
    finally:
        restore(model)
        for module, config in before.items():
            intercept(module, config)
            split_fused_layers(module)


def _settings(model: nn.Module) -> dict[nn.Module, str]:
    """The settings of the modules that have some."""
    found = ((module, settings_of(module)) for module in model.modules())
    return {module: config for module, config in found if config is not None}
