"""The shipped packages execute no data, unpickle nothing and open no connection."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("unisparse_flex", "passes", "block_masks")
CALLS = {"eval", "exec", "compile", "__import__"}
# What must be True so that a call runs no code of a file's, or stays off the network.
SAFE_IF = {"torch.load": "weights_only", "from_pretrained": "local_files_only"}
MODULES = {
    *("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"),
    *("socket", "ssl", "urllib", "http", "ftplib", "requests", "httpx", "aiohttp", "urllib3"),
    *("subprocess", "ctypes", "huggingface_hub"),
}


# What the command does when it is asked to, and nothing else: it runs a benchmark of a checkout,
# and loads a model by name, from the hub where --allow-download says so.
ALLOWED = {
    "unisparse_flex/cli/bench.py": ["import of subprocess"],
    "unisparse_flex/cli/models.py": [
        "AutoModelForCausalLM.from_pretrained",
        "AutoTokenizer.from_pretrained",
    ],
}


def sources() -> list[Path]:
    paths = {path for name in SHIPPED for path in (ROOT / name).rglob("*.py")}
    return sorted(path for path in paths if "unisparse_flex/passes" not in str(path))


def found(tree: ast.AST) -> Iterator[str]:
    """What must not be there, each with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if node.level == 0 else []
        elif isinstance(node, ast.Call):
            names = []
            called = ast.unparse(node.func)
            safe = SAFE_IF.get(called.rpartition(".")[2] if called != "torch.load" else called)
            given = [k.arg for k in node.keywords if ast.unparse(k.value) == "True"]
            if called in CALLS or (safe is not None and safe not in given):
                yield f"{called} in line {node.lineno}"
        else:
            continue
        for name in names:
            if name.split(".")[0] in MODULES:
                yield f"import of {name} in line {node.lineno}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_holds_data_only(path: Path) -> None:
    names = [each.rpartition(" in line ")[0] for each in found(ast.parse(path.read_text()))]
    assert names == ALLOWED.get(path.relative_to(ROOT).as_posix(), [])


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "exec(text)",
        "import pickle",
        "from urllib.request import urlopen",
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "Model.from_pretrained('name')",
        "def f():\n    import socket",
        "__import__('os')",
    ],
)
def test_what_must_not_be_there_is_found(text: str) -> None:
    assert len(list(found(ast.parse(text)))) == 1


def test_all_packages_are_read() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in sources()} == set(SHIPPED)
    assert len(sources()) > 80
