"""A model's attention becomes sparse (`optimize`), and dense again (`restore`)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import fx, nn

from .block_masks import DEFAULT_SELECTOR, Selector
from .block_masks.selectors import choose_selector
from .calibration import DENSE, Calibration, Setting
from .calibration_fit import describe_misfit, say_missing
from .catching import (
    await_first_forward,
    fuse_split_layers,
    holders_of,
    intercept,
    is_intercepted,
    original_module,
    release,
    settings_of,
    split_fused_layers,
)
from .passes import SparseConfig
from .passes.calls import NAMED_SELECTORS, read_selector

if TYPE_CHECKING:
    from .distributed import ContextParallel

ModelT = TypeVar("ModelT", bound=nn.Module)

# Of the module that was given a calibration.
CALIBRATION_ATTRIBUTE = "_unisparse_calibration"
# Attention implementations of Hugging Face models that are ours, by name.
registered_names: set[str] = set()


def optimize(
    model: ModelT,
    selector: Selector | Calibration | str | PathLike[str] | None = None,
    *,
    quality: str | float | None = None,
    min_length: int | None = None,
    dense_layers: Collection[int] = (),
    backend: str = "auto",
    context: ContextParallel | None = None,
) -> ModelT:
    """Makes the attention of ``model`` dynamically block-sparse, compiled or not.

    The model is changed in place: every ``F.scaled_dot_product_attention`` and every
    `nn.MultiheadAttention` without weights inside its forward, and nowhere else, selects blocks
    and attends to these. Parameters, ``state_dict``, hooks,
    ``isinstance`` and saving stay as they were. Calls that cannot or should not be sparse stay
    dense; `explain` says which and why. Optimizing again replaces the settings of the whole
    model; optimizing a submodule afterwards overrides them there. What is compiled already compiles
    anew at its next call, unless `torch.compile` was told to skip guards on modules: call it before
    a model is compiled where that takes long.

    A module that two models share is one object and has one setting, that of the last call: it is
    sparse in a model that nobody optimized too, though `is_optimized` says False of that one. Give
    such a model a copy (``copy.deepcopy``) where it is to stay dense. A layer that is put into the
    model afterwards attends by the settings of what it is put into, not by those of the layer
    before it: sparse, even at a place in ``dense_layers``; optimize again then.

    Rows that a mask hides all keys from are 0 in sparse calls, where dense ones give NaN, or the
    mean of all values under a float mask of only lowest numbers.

    Args:
        model: Any module whose attention goes through these, or what `torch.compile` made of it.
        selector: Which blocks are kept; `UniSparse()` by default. A `Calibration`, or the path of
            the file of one, gives each of the layers that it names settings of its own; all other
            attention stays dense, and a warning says where it is of a model of another class, with
            another number of layers or of heads. A quality in words, ``"paper"`` (the paper's
            policy) or a selector's text such as ``"UniSparse(top_p=0.95)"`` is taken here too.
        quality: ``"fast"``, ``"balanced"`` or ``"high"`` instead of ``selector``: how much of the
            attention mass the default selector keeps. Or a number of at least 0.1: 1 is
            ``"balanced"``, and larger ones keep more blocks (`selectors.selector_of_quality`).
        min_length: Fewest keys for which attention is sparse; shorter calls stay dense, as do
            calls of fewer queries than a block (decoding). By default a cost model decides for
            each call, from its shape and dtype and the device's rates; `explain` shows what it
            predicts. 0 makes every call sparse that can be.
        dense_layers: Indices into the model's layer stacks (``nn.ModuleList``) that stay dense,
            negative ones from the end.
        backend: The kernel on CUDA: ``"flash"`` (FlashAttention-4), ``"triton"``, or ``"auto"``,
            which takes FlashAttention-4 where it is installed and can run the call: 16-bit,
            head_dim up to 128, blocks of 128, inference, under masks that are formulas (causal,
            windows, padding, documents), on Hopper.
        context: The ranks that share the tokens, where ``model`` is given some of a sequence
            (`distributed.ContextParallel`); dense calls see the keys of all ranks too.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module or already a graph, ``selector`` is no selector,
            ``quality`` neither text nor a number, ``dense_layers`` no collection of integers.
        ValueError: ``backend`` is unknown, a layer index is out of range, there is no such quality
            or ``selector`` is given beside it, the text of a selector cannot be read, or the
            calibration is malformed or names what is no module of ``model``.
        OSError: ``selector`` is a path that cannot be read.
    """
    module = validate_model(model)
    if selector is not None and quality is not None:
        got = repr(selector)
        if isinstance(selector, Calibration):
            got = "a Calibration (a calibration has a setting for each layer)"
        raise ValueError(
            f"selector and quality must not both be given, got {got} and {quality!r}; give "
            "selector or quality, not both"
        )
    await_first_forward(module)
    if isinstance(selector, (str, PathLike)):
        selector = _read(selector)
    excluded = _excluded_prefixes(module, dense_layers)
    if isinstance(selector, Calibration):
        layers = dict(selector.layers)
        for name in layers:
            if _is_below(name, excluded):
                layers[name] = DENSE
        _require_layers(module, layers, selector.model)
        optimize_layers(module, layers, min_length=min_length, backend=backend, context=context)
        module.__dict__[CALIBRATION_ATTRIBUTE] = selector
        misfit = describe_misfit(selector, module)
        if misfit is not None:
            warnings.warn(misfit, stacklevel=2)
        return model
    selector = choose_selector(selector, quality)
    name_of = None if context is None else context.name
    sparse = SparseConfig.of_model(
        selector, min_length=min_length, backend=backend, context=name_of
    )
    dense = SparseConfig(selector=selector, dense=True, context=sparse.context)
    _intercept_only(
        module,
        {
            submodule: (dense if _is_below(name, excluded) else sparse).encode()
            for name, submodule in _own_modules(module)
        },
    )
    return model


def _read(path: str | PathLike[str]) -> Selector | Calibration:
    """What a name of a selector, its text, or the path of a calibration stands for."""
    if isinstance(path, str) and (path in NAMED_SELECTORS or _looks_like_call(path)):
        return read_selector(path)
    try:
        return Calibration.load(path)
    except FileNotFoundError as error:
        words = ", ".join(map(repr, NAMED_SELECTORS))
        raise FileNotFoundError(
            error.errno,
            f"selector must be a selector, one of {words}, a selector's text such as "
            "'UniSparse(top_p=0.95)', or the path of a calibration's file, and there is no file of "
            "this name",
            str(path),
        ) from None


def _looks_like_call(text: str) -> bool:
    return "(" in text and not text.endswith(".json") and not Path(text).is_file()


def optimize_layers(
    model: nn.Module,
    layers: Mapping[str, Setting],
    *,
    min_length: int | None = None,
    backend: str = "auto",
    context: ContextParallel | None = None,
) -> None:
    """Gives modules settings of their own; all other attention of ``model`` stays dense.

    Args:
        model: As `optimize` takes it.
        layers: By name (`layer_modules`), a selector or ``"dense"``.
        min_length: See `optimize`.
        backend: See `optimize`.
        context: See `optimize`.

    Raises:
        ValueError: A name is no module of ``model``.
    """
    modules = _require_layers(model, layers)
    name_of = None if context is None else context.name
    dense = SparseConfig(selector=DEFAULT_SELECTOR, dense=True, context=name_of).encode()
    configs = {module: dense for _, module in _own_modules(model)}
    for name, setting in layers.items():
        if isinstance(setting, Selector):
            # Also a module of torch's own: what is around it is dense, and yields to it inside.
            config = SparseConfig.of_model(
                setting, min_length=min_length, backend=backend, context=name_of
            )
            configs[modules[name]] = config.encode()
    _intercept_only(model, configs)


def _require_layers(
    model: nn.Module, layers: Collection[str], of: str | None = None
) -> dict[str, nn.Module]:
    """The `layer_modules` of a model; raises ValueError where some of these are none."""
    modules = layer_modules(model)
    for name in layers:
        if name not in modules:
            raise ValueError(say_missing(name, model, modules, of))
    return modules


def layer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that can have settings of their own, by the name that `explain` uses."""
    return {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if module is model or not _is_graph(module)
    }


def restore(model: ModelT) -> ModelT:
    """Undoes `optimize` in place; a model that was not optimized stays as it is.

    A part of an optimized model is still sparse inside of it: the settings of what is around it
    apply, and a warning names the model to restore. Modules that ``model`` shares with an optimized
    one lose their own settings there too, with a warning where these were others than those around
    them: there they attend by the latter.

    A Hugging Face model that is set to a name of `integrations.register` stays so, with a warning:
    ``model.set_attn_implementation("sdpa")`` makes it dense.

    Args:
        model: A model, or what `torch.compile` made of it (it recompiles at its next call).

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(original_module(model), nn.Module):
        raise TypeError(
            "model must be a torch.nn.Module, optimized or not, got "
            f"{type(original_module(model)).__name__}; of a pipeline pass the module that was "
            "optimized, such as pipeline.transformer or pipeline.model"
        )
    said = _what_restore_leaves(original_module(model))
    release_all(model)
    if said is not None:
        warnings.warn(said, stacklevel=2)
    if (name := registered_name(model)) is not None:
        warnings.warn(
            f"restore undoes optimize, and this model is set to attn_implementation={name!r}, "
            "which stays sparse; call model.set_attn_implementation('sdpa')",
            stacklevel=2,
        )
    return model


def _what_restore_leaves(model: nn.Module) -> str | None:
    """What restoring ``model`` does not undo, or undoes elsewhere; ``None`` for nothing."""
    holders = holders_of(model)
    name = type(model).__name__
    if model in holders:
        if _is_dense(holders[model][0]):
            return None
        whole = type(holders[model][-1]).__name__
        return (
            f"restore must be given the whole model to make it dense, got {name}, a part of an "
            f"optimized {whole} whose settings apply to its parts: this one stays sparse in it; "
            f"restore the {whole}, or optimize it again with dense_layers"
        )
    for module, around in holders.items():
        own = settings_of(module)
        if own is not None and own != settings_of(around[0]):
            whole = type(around[-1]).__name__
            return (
                f"restore also took the settings of modules that this {name} shares with an "
                f"optimized {whole}, which now attends there by the settings of what is around "
                f"them; optimize the {whole} again"
            )
    return None


def _is_dense(module: nn.Module) -> bool:
    config = settings_of(module)
    assert config is not None
    return SparseConfig.decode(config).dense


def release_all(model: nn.Module) -> None:
    """Takes the settings from every module of the model."""
    module = original_module(model)
    if any(is_intercepted(m) for m in module.modules()):
        fuse_split_layers(module)
    for submodule in module.modules():
        release(submodule)
        submodule.__dict__.pop(CALIBRATION_ATTRIBUTE, None)


@contextmanager
def temporarily_optimize(
    model: ModelT,
    selector: Selector | Calibration | str | PathLike[str] | None = None,
    *,
    quality: str | float | None = None,
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
        quality: As `optimize` takes it.
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
    module = validate_model(model)
    before, calibrations = _settings(module), _calibrations(module)
    if context is None and any(SparseConfig.decode(config).context for config in before.values()):
        raise ValueError(
            "context must be given for a model that was optimized with one, got None: its ranks "
            "would attend to only their own tokens; pass the same ContextParallel, or restore the "
            "model first"
        )
    try:
        yield optimize(
            model,
            selector,
            quality=quality,
            min_length=min_length,
            dense_layers=dense_layers,
            backend=backend,
            context=context,
        )
    finally:
        release_all(model)
        for submodule, config in before.items():
            intercept(submodule, config)
            split_fused_layers(submodule)
        for submodule, calibration in calibrations.items():
            submodule.__dict__[CALIBRATION_ATTRIBUTE] = calibration


def is_optimized(model: nn.Module) -> bool:
    """Whether attention of ``model`` is to be sparse, compiled or not.

    By `optimize`, or as a Hugging Face model that is set to a name of `integrations.register`. It
    is said of the module as `optimize` saw it: False of one that was not optimized and has parts
    that were (a layer that it shares with an optimized model), and of a part that `restore` was
    given, although these attend sparsely inside of an optimized model.
    """
    module = original_module(model)
    return is_intercepted(module) or registered_name(model) is not None


def registered_name(model: nn.Module) -> str | None:
    """The name of `integrations.register` that a Hugging Face model is set to, if any."""
    config = getattr(original_module(model), "config", None)
    name = getattr(config, "_attn_implementation", None)
    return name if isinstance(name, str) and name in registered_names else None


def validate_model(model: object) -> nn.Module:
    """Raises unless `optimize` takes ``model``; the module that it is, or was compiled from."""
    module: object = original_module(model)
    if isinstance(module, type):
        name = module.__name__
        raise TypeError(f"model must be a torch.nn.Module, got the class {name}; give {name}(...)")
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(module).__name__}; of a pipeline pass the "
            "model inside (pipe.transformer), for an exported program or an FX graph call "
            "unisparse_flex.passes.rewrite_sdpa"
        )
    if _is_graph(module):
        raise TypeError(
            f"model must be a module in Python, got the graph {type(module).__name__}; "
            "optimize the module before tracing it, or call unisparse_flex.passes.rewrite_sdpa"
        )
    return module


def _settings(model: nn.Module) -> dict[nn.Module, str]:
    """The settings of the modules that have some."""
    found = ((module, settings_of(module)) for module in model.modules())
    return {module: config for module, config in found if config is not None}


def _calibrations(model: nn.Module) -> dict[nn.Module, Calibration]:
    """The calibrations of the modules that were given one, the outermost first."""
    found = ((module, vars(module).get(CALIBRATION_ATTRIBUTE)) for module in model.modules())
    return {module: each for module, each in found if each is not None}


def calibration_of(model: nn.Module) -> Calibration | None:
    """The calibration that gave a model its settings; of several the outermost."""
    return next(iter(_calibrations(model).values()), None)


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The root and every submodule whose class is not torch's own, but for encoders.

    Inner modules are caught too: activation checkpointing calls them again outside the root.
    """
    for name, module in model.named_modules():
        of_torch = type(module).__module__.startswith("torch.")
        of_torch = of_torch and not isinstance(module, nn.TransformerEncoder)
        if module is model or not (_is_graph(module) or of_torch):
            yield name, module


def _intercept_only(model: nn.Module, configs: Mapping[nn.Module, str]) -> None:
    """Gives modules their settings; others lose what an earlier call gave them."""
    for module in model.modules():
        module.__dict__.pop(CALIBRATION_ATTRIBUTE, None)
        if module in configs:
            intercept(module, configs[module])
        else:
            release(module)
    split_fused_layers(model)


def _is_graph(module: object) -> bool:
    return isinstance(module, (fx.GraphModule, torch.jit.ScriptModule))


def _is_below(name: str, prefixes: Collection[str]) -> bool:
    return any((name + ".").startswith(prefix) for prefix in prefixes)


def _excluded_prefixes(model: nn.Module, dense_layers: Collection[int]) -> list[str]:
    """Names of the layers that ``dense_layers`` asks for, each with a dot after it."""
    if isinstance(dense_layers, (str, bytes)) or not isinstance(dense_layers, Collection):
        raise TypeError(
            "dense_layers must be a collection of layer indices, got "
            f"{dense_layers!r} of type {type(dense_layers).__name__}; one layer is (0,)"
        )
    stacks = {
        name: len(module)
        for name, module in model.named_modules()
        # A stack inside a layer of another (experts, say) is no stack of layers.
        if isinstance(module, nn.ModuleList) and not re.search(r"(^|\.)\d+(\.|$)", name)
    }
    longest = max(stacks.values(), default=0)
    for index in dense_layers:
        if not isinstance(index, int) or not -longest <= index < longest:
            raise ValueError(
                f"dense_layers must index the model's layers (0 to {longest - 1}), got {index!r}"
            )
    return [
        f"{name}.{index % length}."
        for name, length in stacks.items()
        for index in dense_layers
        if -length <= index < length
    ]
