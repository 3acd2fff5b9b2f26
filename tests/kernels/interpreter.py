"""Copies of the Triton kernels that run on the CPU, apart from those that other tests import."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

NAMES = (
    "scratch",
    "launch",
    "pool",
    "pages",
    "rows",
    "decode",
    "nearest_keys",
    "intervals",
    "read",
    "turn",
    "score_rows",
    "score",
    "select",
    "lists",
)
PACKAGE = "unisparse_flex.block_masks.kernels"


@dataclass(frozen=True)
class Kernels:
    """The modules of `unisparse_flex.block_masks.kernels`, interpreted."""

    scratch: Any
    launch: Any
    pool: Any
    pages: Any
    rows: Any
    decode: Any
    nearest_keys: Any
    intervals: Any
    read: Any
    turn: Any
    score_rows: Any
    score: Any
    select: Any
    lists: Any


@contextmanager
def interpreted() -> Iterator[Kernels]:
    """Imports the kernels anew for Triton's interpreter; afterwards all is as before."""
    triton: Any = importlib.import_module("triton")
    language = triton.language
    # The interpreter's first call imports this, which decorates Triton's functions once more.
    importlib.import_module("triton.experimental.gluon")
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patched = (
        language,
        language.core,
        language.math,
        language.standard,
        language.core.tensor,
        language.core.tensor_descriptor_base,
        language.core.dtype,
    )
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for owner in patched:
            stack.callback(_restore, owner, dict(vars(owner)))
        # A function is interpreted if this says so when it is decorated, Triton's own too.
        patch.setattr(triton.knobs.runtime, "interpret", True)
        for module in (language, language.standard):
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.JITFunction):
                    setattr(module, name, triton.jit(value.fn))
        # What was rewritten reads names that are put into Triton's modules, and removed at the end.
        patch.setattr(interpreter.InterpretedFunction, "rewritten_fn", {})
        patch.setattr(interpreter, "_patch_lang", _once(interpreter._patch_lang, language))
        builder = interpreter.InterpreterBuilder
        patch.setattr(builder, "create_dot", _in_float32(builder.create_dot, language))
        yield Kernels(**_import_copies(patch))


def _in_float32(create_dot: Callable[..., Any], language: Any) -> Callable[..., Any]:
    """The interpreter's product, which takes bfloat16 for the integers that it stores."""

    def widen(operand: Any) -> Any:
        if operand.dtype.scalar != language.bfloat16 or operand.data.dtype.kind == "f":
            return operand
        bits = operand.data.astype("uint32") << 16
        return type(operand)(bits.view("float32"), language.float32)

    def dot(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        return create_dot(self, widen(left), widen(right), *rest)

    return dot


def _once(patch_language: Callable[[Any], Any], language: Any) -> Callable[[Any], Any]:
    """The interpreter's patch of Triton's language, which is left in place and not repeated."""
    done: set[frozenset[int]] = set()

    def patch(function: Any) -> Any:
        modules = (language, language.core)
        seen = frozenset(id(m) for m in modules if m in function.__globals__.values())
        if seen not in done:
            done.add(seen)
            patch_language(function)
        return SimpleNamespace(restore=lambda: None)

    return patch


def _restore(owner: Any, before: dict[str, Any]) -> None:
    for name, value in list(vars(owner).items()):
        if name not in before:
            delattr(owner, name)
        elif value is not before[name]:
            setattr(owner, name, before[name])


def _import_copies(patch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    package = importlib.import_module(PACKAGE)
    for name in NAMES:
        patch.delitem(sys.modules, f"{PACKAGE}.{name}", raising=False)
        patch.delattr(package, name, raising=False)
    copies = {name: importlib.import_module(f"{PACKAGE}.{name}") for name in NAMES}
    for name in NAMES:
        del sys.modules[f"{PACKAGE}.{name}"]
        delattr(package, name)
    return copies
