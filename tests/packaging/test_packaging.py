"""What is installed: the wheel's names, its requirements, and how the layers are imported."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LAUNCHER = "unisparse_flex_command.py"
SOURCES = (
    *("pyproject.toml", "README.md", "LICENSE", LAUNCHER),
    *("unisparse_flex", "passes", "block_masks"),
)
CODE_FOLDERS = ("unisparse_flex", "passes", "block_masks", "tests", "bench", "examples")
OPTIONAL_MODULES = ("triton", "transformers", "matplotlib", "rich", "click", "jinja2")
DATA_SUFFIXES = (".py", ".css", ".jinja", ".json", ".typed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    # A copy, so that stale files under build/ cannot reach the wheel.
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(out), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def find_packages() -> set[str]:
    folders = os.walk(ROOT / "unisparse_flex", followlinks=True)
    return {
        ".".join(Path(folder).relative_to(ROOT).parts)
        for folder, _, files in folders
        if "__init__.py" in files
    }


def find_code_files() -> list[Path]:
    return sorted(
        Path(folder) / file
        for name in CODE_FOLDERS
        for folder, _, files in os.walk(ROOT / name)
        for file in files
        if file.endswith(".py")
    )


def absolute_imports(source: str) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.lineno, node.module))
    return found


def test_wheel_installs_unisparse_flex_and_what_starts_its_command(wheel: zipfile.ZipFile) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"unisparse_flex", LAUNCHER, f"unisparse_flex-{version}.dist-info"}


def test_wheel_holds_every_module_and_data_file_of_the_tree(wheel: zipfile.ZipFile) -> None:
    tree = {
        (Path(folder) / file).relative_to(ROOT).as_posix()
        for folder, _, files in os.walk(ROOT / "unisparse_flex", followlinks=True)
        for file in files
        if file.endswith(DATA_SUFFIXES)
    }
    installed = {name for name in wheel.namelist() if name.startswith("unisparse_flex/")}
    assert installed == tree
    assert "unisparse_flex/py.typed" in installed


def test_wheel_installs_the_command(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    entries = wheel.read(name).decode()
    assert "[console_scripts]\nunisparse-flex = unisparse_flex_command:main\n" in entries


def test_wheel_requires_torch_and_sympy_alone(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    unconditional = {
        requirement.name
        for requirement in requirements
        if requirement.marker is None or "extra" not in str(requirement.marker)
    }
    assert unconditional == {"torch", "sympy"}


def test_packages_in_pyproject_are_the_packages_of_the_tree() -> None:
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = configuration["tool"]["setuptools"]["packages"]
    assert len(packages) == len(set(packages))
    assert set(packages) == find_packages()


def test_layers_are_imported_through_unisparse_flex_only() -> None:
    files = find_code_files()
    assert files
    bare = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in files
        for line, module in absolute_imports(path.read_text())
        if module.split(".")[0] in {"passes", "block_masks"}
    ]
    assert bare == []


def test_unisparse_flex_imports_without_optional_packages() -> None:
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL_MODULES!r}))\n"
        "import unisparse_flex, unisparse_flex.passes, unisparse_flex.block_masks\n"
        "import unisparse_flex.doctor, unisparse_flex.reports\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("text", ["prose", "code"])
def test_the_readme_shows_what_the_demo_wrote(text: str) -> None:
    written = json.loads((ROOT / f"bench/results/demo-{text}.json").read_text())
    dense, sparse = written["rows"]
    found = [("no", "yes")[row["found"]] for row in (dense, sparse)]
    speed = dense["prefill_seconds"] / sparse["prefill_seconds"]
    row = (
        f"| {text} | {sparse['density']:.1%} | {sparse['recall']:.1%} | {sparse['kl']:.4f} "
        f"| {sparse['perplexity_ratio']:.3f} | {found[0]} / {found[1]} | {speed:.2f}x |"
    )
    assert row in (ROOT / "README.md").read_text()
