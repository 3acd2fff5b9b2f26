"""Processes that share a directory of compiled kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, torch
import unisparse_flex
from tests.api.models import FINE, SELECTOR, Attention, create, embeddings
selector = {"fine": FINE, "coarse": SELECTOR}[sys.argv[1]]
model = unisparse_flex.optimize(create(Attention), selector, min_length=0)
with torch.no_grad():
    eager = model(embeddings(200))
    compiled = torch.compile(model, fullgraph=True)(embeddings(200))
torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
print(float(eager.double().sum()).hex())
"""
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_processes_that_share_a_cache_keep_their_own_settings(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }

    def start(selector: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, selector],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def outputs(*processes: subprocess.Popen[str]) -> list[str]:
        found = [process.communicate() for process in processes]
        for process, (_, errors) in zip(processes, found, strict=True):
            assert process.returncode == 0, errors
        return [output for output, _ in found]

    fine, coarse = outputs(start("fine"), start("coarse"))
    assert fine != coarse
    assert any(tmp_path.rglob("*.so"))
    # From what both left behind.
    assert outputs(start("fine")) == [fine]


UNVECTORISED = """
import sys, torch
import unisparse_flex
from tests.api.models import SELECTOR, Attention, create, embeddings
from unisparse_flex.passes import DenseReason
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
x = embeddings(200)
with torch.no_grad():
    plain = create(Attention)(x)
    model = unisparse_flex.optimize(create(Attention), SELECTOR)
    (call,) = unisparse_flex.explain(model, x).calls
    assert call.reason is DenseReason.NO_KERNEL, call
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), plain)
    asked = unisparse_flex.optimize(create(Attention), SELECTOR, min_length=0)
    sparse = asked(x)
    assert (sparse - plain).abs().max() > 0.01
    compiled = torch.compile(asked, fullgraph=True)(x)
torch.testing.assert_close(compiled, sparse, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
def test_a_cpu_without_a_flex_kernel_stays_dense_or_applies_the_blocks_as_a_mask() -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", UNVECTORISED]
    process = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
