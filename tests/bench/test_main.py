"""``python -m bench`` lists the benchmarks and runs them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import __main__ as harness
from bench.registry import BENCHMARKS as REGISTERED
from unisparse_flex.cli.bench import BENCHMARKS

BENCH = Path(harness.__file__).parent
ROOT = BENCH.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def test_everything_with_a_main_is_listed_with_what_it_says_of_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert harness.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert harness.main([]) == 0
    assert capsys.readouterr().out == printed
    listed = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert set(BENCHMARKS) < set(listed)
    assert not {"measure", "record", "timing", "__main__"} & set(listed)
    assert all(len(purpose) > 20 for purpose in listed.values())


def test_a_benchmark_gets_its_arguments() -> None:
    command = [sys.executable, "-m", "bench", "cost_rates", "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0
    assert "--plain-selection" in ran.stdout


def can_be_run(module: str) -> bool:
    """Whether ``python -m`` takes the module; of a folder it takes its ``__main__``."""
    spec = find_spec(module)
    if spec is None:
        return False
    return not spec.submodule_search_locations or find_spec(f"{module}.__main__") is not None


def test_every_benchmark_of_the_registry_is_listed_and_can_be_run_by_its_module() -> None:
    entries = harness.find_benchmarks()
    for benchmark in REGISTERED:
        assert can_be_run(benchmark.module), benchmark
        if benchmark.module.startswith("bench."):
            assert entries[benchmark.name].module == benchmark.module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_can_be_run(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m (bench\.\w+)", text):
        assert can_be_run(module), module
    assert set(re.findall(r"python -m bench (\w+)", text)) <= set(harness.find_benchmarks())


def test_former_names_lead_to_what_does_the_same_now() -> None:
    assert not set(harness.RENAMED) & set(harness.find_benchmarks())
    assert set(harness.RENAMED.values()) <= set(harness.find_benchmarks())


@pytest.mark.parametrize(
    "path", sorted(BENCH.glob("*/*.py")), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_folders_are_used_through_what_they_export(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level == 2 and node.module:
            assert "." not in node.module, f"{path}: {node.module}"


def test_an_unknown_name_is_said_with_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.main(["speed"]) == 2
    assert "got 'speed'; list them with: python -m bench --list" in capsys.readouterr().err


EVERY_PAGE = sorted([*PAGES, *ROOT.glob("docs/evidence/*.md")])


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_files_of_this_folder_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(r"`(bench/[\w/]+\.py)", page.read_text())
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.name)
def test_pictures_have_a_caption(page: Path) -> None:
    after = re.findall(r"^!\[[^\]]*\]\([^)]+\.png\)\n\n?(.?)", page.read_text(), re.MULTILINE)
    # Of several pictures the last has it.
    assert set(after) <= {"*", "!"}
