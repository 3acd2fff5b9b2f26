"""What a calibration was made for: its prompts in words, and whether a model is the one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from .calibration import Calibration
from .counted import counted
from .passes.calls import is_dtensor

# Names of attributes that say how many heads there are, or how wide: num_heads, n_kv_heads,
# head_dim, num_key_value_groups, nhead, h.
_OF_HEADS = re.compile(r"head|(^|_)(kv|groups|h)(_|$)")


def attention_sizes(model: nn.Module, layers: Iterable[str]) -> dict[str, int]:
    """What tells a model from others of its class, as far as its modules say it.

    Args:
        model: The model.
        layers: Names of its modules that make attention calls.

    Returns:
        ``"layers"``: how many modules have such names, numbers aside; and what the layers, or
        their configurations, say of heads.
    """
    modules = dict(model.named_modules())
    kinds = {_without_numbers(name) for name in layers}
    sizes = {"layers": sum(_without_numbers(name) in kinds for name in modules)}
    for name in layers:
        module = modules.get(name)
        own = {} if module is None else vars(module)
        config = own.get("config")
        for said in (own, {} if config is None else getattr(config, "__dict__", {})):
            for key, value in said.items():
                is_size = isinstance(value, int) and not isinstance(value, bool)
                if is_size and not key.startswith("_") and _OF_HEADS.search(key):
                    sizes.setdefault(key, value)
    return sizes


def describe_misfit(calibration: Calibration, model: nn.Module) -> str | None:
    """How a model that has the layers of a calibration is another one; ``None`` if it is not.

    Returns:
        A sentence that names both, for a warning.
    """
    # A class of FSDP's own stands for the model's.
    own = type(model).__name__.removeprefix("FSDP")
    found = attention_sizes(model, calibration.layers)
    if any(map(is_dtensor, model.parameters())):
        # Modules of a tensor parallel model may say how many heads a rank has.
        found = {"layers": found["layers"]}
    unlike = {
        name: (size, found[name])
        for name, size in calibration.sizes.items()
        if name in found and found[name] != size
    }
    if own == calibration.model.removeprefix("FSDP") and not unlike:
        return None
    theirs = _say(calibration.model, {name: sizes[0] for name, sizes in unlike.items()})
    ours = _say(own, {name: sizes[1] for name, sizes in unlike.items()})
    rest = "; layers that it does not name stay dense" if "layers" in unlike else ""
    return (
        f"selector must be the calibration of the model that it is given to, got one of {theirs} "
        f"for {ours}{rest}, and the {calibration.quality} that it reached there may not hold here; "
        "calibrate this model"
    )


def describe_calibration(calibration: Calibration, tokens: int) -> str:
    """The lengths, the target and the sparse layers of a calibration in words.

    Args:
        calibration: Which.
        tokens: Of the longest prompt that it is used for.
    """
    lengths = calibration.lengths
    at = ""
    if lengths:
        first = "" if len(lengths) == 1 else f"{min(lengths)} to "
        at = f" at {first}{counted(max(lengths), 'token')}"
    far = ""
    if calibration.is_far_beyond(tokens):
        far = f"; its target was not looked at for {counted(tokens, 'token')}"
    target = f"{calibration.quality} {calibration.target:g}"
    sparse = counted(len(calibration.sparse_layers), "layer")
    return f"calibrated{at} for {target}, {sparse} sparse{far}"


def say_missing(name: str, model: nn.Module, modules: Iterable[str], of: str | None) -> str:
    """That a model does not have a layer, and what to do.

    Args:
        name: The layer that it does not have.
        model: The model.
        modules: Names of the modules that it has.
        of: Class of the model that was calibrated, where somebody did.
    """
    way_out = "calibrate this model anew"
    # A part of the calibrated model, or a module around it, has the layer under another name.
    if any(name.endswith(f".{m}") or m.endswith(f".{name}") for m in modules):
        whole = "the model that was calibrated" if of is None else f"the {of} that was calibrated"
        way_out = f"give it {whole}, not a part of it or a module around it"
    got = repr(name) if of is None else f"{name!r} of {of}"
    return (
        f"layers must name modules of the model, got {got}, which {type(model).__name__} does not "
        f"have; {way_out}"
    )


def _without_numbers(name: str) -> str:
    return re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name)


def _say(model: str, sizes: Mapping[str, int]) -> str:
    said = ", ".join(f"{name}={size}" for name, size in sizes.items())
    return f"{model} ({said})" if said else model
