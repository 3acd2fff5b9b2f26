"""The pages of the docs: their code runs as it is written, and what is generated is up to date."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import unisparse_flex
from bench import tables
from unisparse_flex import block_masks, distributed, selectors
from unisparse_flex.integrations import transformers

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def code_of(page: str) -> list[str]:
    return BLOCK.findall((DOCS / page).read_text())


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs a page's blocks one after the other, as a reader would in one session."""
    monkeypatch.chdir(folder)
    torch._dynamo.reset()
    names: dict[str, Any] = {"__name__": page}
    for place, block in enumerate(code_of(page)):
        exec(compile(block, f"{page}, block {place}", "exec"), names)
    return names


@pytest.mark.slow
def test_the_start_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("start.md", tmp_path, monkeypatch)
    assert re.search(r"30 sparse, mean density 0\.\d+, 0 dense", capsys.readouterr().out)


@pytest.mark.slow
def test_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run("tutorial.md", tmp_path, monkeypatch)
    out = capsys.readouterr().out
    rows = re.findall(r"threshold (0\.\d+): density (0\.\d+), KL to dense (0\.\d+)", out)
    densities, divergences = ([float(row[i]) for row in rows] for i in (1, 2))
    # A lower threshold keeps more and errs less, as the page says.
    assert densities == sorted(densities)
    assert divergences == sorted(divergences, reverse=True)
    assert len(rows) == 3
    assert names["found"].reached >= 0.95
    assert (tmp_path / "calibration.json").is_file()


def test_every_public_name_is_on_the_api_page() -> None:
    documented = {
        name.rpartition(".")[2]
        for name in re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    }
    modules = (unisparse_flex, selectors, distributed, transformers)
    public = {name for module in modules for name in module.__all__} - {"selectors"}
    public |= {"record_attention", "Explanation", "AttentionRecord"}
    # Without those that are for the other layers.
    public |= set(block_masks.__all__) - {"fix_strides", "supports_dtype"}
    assert public - documented == set()
    assert documented - public == set()


def test_every_reason_is_on_the_page_of_the_pass() -> None:
    page = (DOCS / "pass.md").read_text()
    assert tables.fill(page) == page
    bare = re.sub("`SLOWER`.*", "", page)
    assert tables.fill(bare) == page != bare


def test_every_page_is_in_the_navigation() -> None:
    # Its tags for Python objects are not needed here.
    site = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text())
    named = {page for entry in site["nav"] for page in entry.values()}
    assert named == {path.name for path in DOCS.glob("*.md")}


def test_every_picture_is_on_a_page() -> None:
    text = "".join(path.read_text() for path in DOCS.glob("*.md"))
    assert {path.name for path in DOCS.glob("*.png")} == set(
        re.findall(r"\]\(([\w-]+\.png)\)", text)
    )
